//! The one config tree.
