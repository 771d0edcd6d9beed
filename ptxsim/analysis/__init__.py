"""What is said about a kernel's synchronisation: the race detector, and damage to it that should be noticed."""
