"""Tables and pictures: what a reader sees, and progress."""
