"""What kernels of both wings share: tiles, and the device they run on."""
