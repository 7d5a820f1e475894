"""The agent as a program, wired in one function, and its command line."""
