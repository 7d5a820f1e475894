"""The programs, each wired in one function, and their command lines."""
