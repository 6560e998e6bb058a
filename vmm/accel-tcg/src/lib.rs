//! Translation behind the accelerator traits.
