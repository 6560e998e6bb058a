//! key=value option strings through serde.
