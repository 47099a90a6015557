"""Source string -> cubin -> loaded function -> launch."""
