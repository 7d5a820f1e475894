"""The chance of a request, for many models at once: arrays of numpy, no clock but the one given, no I/O but the file of what it knows."""
