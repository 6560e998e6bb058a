//! What of the RISC-V extensions a model may ask for.

use holdfast_arch::riscv64::IsaModel;

/// `misa`: RV64 with A, C, D, F, I, M, S and U.
pub const MISA: u64 = 2 << 62 | 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 8 | 1 << 12 | 1 << 18 | 1 << 20;

/// Multi-letter extensions that this guest has. Zba, Zbb and Zbs are there whether named or not: the
/// specification leaves open what reserved encodings do.
const KNOWN: &[&str] =
    &["zicntr", "zihpm", "zicsr", "zifencei", "zmmul", "zaamo", "zalrsc", "zba", "zbb", "zbs", "sstc"];

/// What is left of an [`IsaModel`] once it is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa {
    /// `stimecmp` exists.
    pub sstc: bool,
    /// Largest MODE of `satp`.
    pub max_satp_mode: u64,
    /// PMP entries.
    pub pmp_entries: u64,
    /// Ticks of `time` per second.
    pub timebase_hz: u64,
}

/// Checks a model.
///
/// # Errors
/// What of it is not supported.
pub fn parse(model: &IsaModel) -> Result<Isa, String> {
    let text = model.isa.to_ascii_lowercase();
    let mut parts = text.split('_');
    let base = parts.next().unwrap_or_default();
    let letters = base
        .strip_prefix("rv64")
        .ok_or_else(|| format!("ISA `{}`: only rv64 is supported", model.isa))?
        .replace('g', "imafd");
    if let Some(other) = letters.chars().find(|c| !"imafdcsu".contains(*c)) {
        return Err(format!("ISA extension `{other}` is not supported"));
    }
    if let Some(missing) = "imafdc".chars().find(|c| !letters.contains(*c)) {
        return Err(format!("ISA `{}`: `{missing}` cannot be left out", model.isa));
    }
    let mut sstc = false;
    for extension in parts {
        if !KNOWN.contains(&extension) {
            return Err(format!("ISA extension `{extension}` is not supported"));
        }
        sstc |= extension == "sstc";
    }
    let max_satp_mode = match model.mmu.as_str() {
        "sv39" => 8,
        "sv48" => 9,
        "sv57" => 10,
        other => return Err(format!("MMU mode `{other}` is not supported; sv39, sv48 and sv57 are")),
    };
    if model.pmp_entries > 64 {
        return Err(format!("{} PMP entries are not supported; 0 to 64 are", model.pmp_entries));
    }
    if !(1..=1_000_000_000).contains(&model.timebase_hz) {
        return Err(format!("a timebase of {} Hz is not supported; 1 to 1000000000 is", model.timebase_hz));
    }
    Ok(Isa { sstc, max_satp_mode, pmp_entries: u64::from(model.pmp_entries), timebase_hz: model.timebase_hz })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_taken_or_refused_by_name() {
        let isa = parse(&IsaModel::default()).expect("the default");
        assert_eq!((isa.sstc, isa.max_satp_mode), (true, 10));
        let with = |isa: &str| parse(&IsaModel { isa: isa.into(), ..IsaModel::default() });
        assert!(with("rv64gc").is_ok_and(|i| !i.sstc));
        assert_eq!(with("rv64imafdcv"), Err("ISA extension `v` is not supported".into()));
        assert_eq!(with("rv64gc_svpbmt"), Err("ISA extension `svpbmt` is not supported".into()));
        assert!(with("rv32gc").is_err_and(|e| e.contains("only rv64")));
        assert!(with("rv64imac").is_err_and(|e| e.contains("`f` cannot be left out")));
        let odd = IsaModel { mmu: "sv32".into(), ..IsaModel::default() };
        assert!(parse(&odd).is_err_and(|e| e.contains("`sv32`")));
    }
}
