"""The socket's protocol: frames with descriptors, and errors."""
