"""One file per LLM back-end; the file name is the plug-in name."""
