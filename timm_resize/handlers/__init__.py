"""One file per architecture; each registers its handlers. Nothing else needs to know of a new file here."""
