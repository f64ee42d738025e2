"""Bundles that are shipped with the package."""
