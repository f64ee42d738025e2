"""A live session that does less when the machine is too hot, too full or too busy, and all again when it is not."""
