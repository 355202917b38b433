"""One file per SAE architecture; the file name is the plug-in name."""
