"""One device's memory behind the same calls: a GPU's, or the host's."""
