"""One file per explainer; the file name is the plug-in name."""
