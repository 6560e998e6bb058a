//! What the host processor offers beyond SSE2.

/// Optional instruction sets that generated code may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostFeatures {
    /// `andn`
    pub bmi1: bool,
    /// `shlx`, `shrx`, `sarx`, `rorx`
    pub bmi2: bool,
    /// `lzcnt`
    pub lzcnt: bool,
    /// `popcnt`
    pub popcnt: bool,
    /// Fused multiply-add.
    pub fma: bool,
    /// VEX encodings, usable.
    pub avx: bool,
}

impl HostFeatures {
    /// What this processor has.
    pub fn detect() -> Self {
        Self {
            bmi1: is_x86_feature_detected!("bmi1"),
            bmi2: is_x86_feature_detected!("bmi2"),
            lzcnt: is_x86_feature_detected!("lzcnt"),
            popcnt: is_x86_feature_detected!("popcnt"),
            fma: is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx"),
            avx: is_x86_feature_detected!("avx"),
        }
    }

    /// Nothing but the x86-64 baseline.
    pub const fn baseline() -> Self {
        Self { bmi1: false, bmi2: false, lzcnt: false, popcnt: false, fma: false, avx: false }
    }
}
