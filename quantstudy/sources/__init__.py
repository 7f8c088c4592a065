"""Where images come from: the embedded digits, torchvision's data sets, a folder or an archive of one."""
