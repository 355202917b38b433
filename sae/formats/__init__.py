"""One file per foreign checkpoint format; the file name is the plug-in name."""
