"""Images: one container file per split, and batches on the device."""
