//! Software floating point with per-guest policy.
