"""One file per simulator; the file name is the plug-in name."""
