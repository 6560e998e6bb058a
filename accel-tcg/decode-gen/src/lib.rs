//! Generates instruction decoders from text tables.
