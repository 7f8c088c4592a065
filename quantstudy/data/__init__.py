"""Images: sources, one container file per split, and batches on the device."""
