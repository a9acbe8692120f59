"""A comparison on the disk, and where its numbers come from."""
