//! KVM behind the accelerator traits.
