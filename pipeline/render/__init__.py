"""Records and encoded pictures in, pixels out: the renderers, one file each, behind one protocol."""
