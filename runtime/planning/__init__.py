"""What a board will do before it is bought: memory, times and tokens a second from counts, data sheets and measurements."""
