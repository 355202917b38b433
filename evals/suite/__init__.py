"""One file per evaluation; the file name is the plug-in name."""
