"""One file per scorer; the file name is the plug-in name."""
