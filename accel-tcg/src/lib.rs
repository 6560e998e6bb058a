//! The translating accelerator's facade.
