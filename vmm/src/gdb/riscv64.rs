//! Registers of RISC-V guests: gdb's standard features.

use std::fmt::Write;
use std::sync::OnceLock;

use holdfast_arch::CpuState;
use holdfast_arch::riscv64::State;

use super::target::Registers;

/// The architecture.
#[derive(Debug)]
pub(super) struct Riscv;

const X: [&str; 32] = [
    "zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "fp", "s1", "a0", "a1", "a2", "a3", "a4", "a5", "a6",
    "a7", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4", "t5", "t6",
];

const F: [&str; 32] = [
    "ft0", "ft1", "ft2", "ft3", "ft4", "ft5", "ft6", "ft7", "fs0", "fs1", "fa0", "fa1", "fa2", "fa3", "fa4",
    "fa5", "fa6", "fa7", "fs2", "fs3", "fs4", "fs5", "fs6", "fs7", "fs8", "fs9", "fs10", "fs11", "ft8",
    "ft9", "ft10", "ft11",
];

/// CSRs that are shown, with their numbers.
const CSRS: [(&str, u16); 23] = [
    ("stvec", 0x105),
    ("scounteren", 0x106),
    ("senvcfg", 0x10a),
    ("sscratch", 0x140),
    ("sepc", 0x141),
    ("scause", 0x142),
    ("stval", 0x143),
    ("stimecmp", 0x14d),
    ("satp", 0x180),
    ("mstatus", 0x300),
    ("misa", 0x301),
    ("medeleg", 0x302),
    ("mideleg", 0x303),
    ("mie", 0x304),
    ("mtvec", 0x305),
    ("mcounteren", 0x306),
    ("menvcfg", 0x30a),
    ("mscratch", 0x340),
    ("mepc", 0x341),
    ("mcause", 0x342),
    ("mtval", 0x343),
    ("mip", 0x344),
    ("mhartid", 0xf14),
];

const FCSR: u16 = 0x003;
const MHARTID: u16 = 0xf14;

fn describe() -> String {
    let mut t = String::from(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target>\
         <architecture>riscv:rv64</architecture><feature name=\"org.gnu.gdb.riscv.cpu\">\n",
    );
    // Writing to a String cannot fail.
    let reg = |t: &mut String, name: &str, bits: u32, kind: &str| {
        let _ = writeln!(t, r#"<reg name="{name}" bitsize="{bits}" type="{kind}"/>"#);
    };
    for name in X {
        let kind = match name {
            "ra" => "code_ptr",
            "sp" | "gp" | "tp" | "fp" => "data_ptr",
            _ => "int",
        };
        reg(&mut t, name, 64, kind);
    }
    reg(&mut t, "pc", 64, "code_ptr");
    t += "</feature><feature name=\"org.gnu.gdb.riscv.fpu\">\n\
          <union id=\"riscv_double\"><field name=\"float\" type=\"ieee_single\"/>\
          <field name=\"double\" type=\"ieee_double\"/></union>\n";
    F.iter().for_each(|name| reg(&mut t, name, 64, "riscv_double"));
    ["fflags", "frm", "fcsr"].iter().for_each(|name| reg(&mut t, name, 32, "int"));
    t += "</feature><feature name=\"org.gnu.gdb.riscv.csr\">\n";
    CSRS.iter().for_each(|(name, _)| reg(&mut t, name, 64, "int"));
    t += "</feature><feature name=\"org.gnu.gdb.riscv.virtual\">\n";
    reg(&mut t, "priv", 64, "int");
    t += "</feature></target>";
    t
}

fn of(state: &CpuState) -> Option<&State> {
    match state {
        CpuState::Riscv64(state) => Some(state),
        CpuState::X86_64(_) => None,
    }
}

impl Registers for Riscv {
    fn description() -> &'static str {
        static TEXT: OnceLock<String> = OnceLock::new();
        TEXT.get_or_init(describe)
    }

    fn read(state: &CpuState) -> Option<Vec<Option<u8>>> {
        let s = of(state)?;
        let mut all = Vec::new();
        let mut put = |value: Option<u64>, len: usize| match value {
            Some(value) => all.extend(value.to_le_bytes()[..len].iter().copied().map(Some)),
            None => all.extend(std::iter::repeat_n(None, len)),
        };
        s.x.iter().chain([&s.pc]).chain(&s.f).for_each(|value| put(Some(*value), 8));
        let fcsr = s.csrs.get(&FCSR).copied();
        for part in [fcsr.map(|v| v & 0x1f), fcsr.map(|v| v >> 5 & 7), fcsr] {
            put(part, 4);
        }
        for (_, number) in CSRS {
            put(if number == MHARTID { Some(s.hartid) } else { s.csrs.get(&number).copied() }, 8);
        }
        put(Some(u64::from(s.privilege)), 8);
        Some(all)
    }

    fn write(state: &mut CpuState, bytes: &[u8]) -> Option<()> {
        let old = Self::read(state)?;
        let CpuState::Riscv64(s) = state else { return None };
        if bytes.len() < old.len() {
            return None;
        }
        // Every register that differs from what was read, by its place.
        let mut at = 0;
        let mut next = |len: usize| {
            let (was, now) = (old.get(at..at + len)?, bytes.get(at..at + len)?);
            at += len;
            let same = was.iter().zip(now).all(|(w, n)| w.is_none() || *w == Some(*n));
            let value = now.iter().rev().fold(0_u64, |v, b| v << 8 | u64::from(*b));
            Some((!same).then_some(value))
        };
        for slot in s.x.iter_mut().chain([&mut s.pc]).chain(&mut s.f) {
            *slot = next(8)?.unwrap_or(*slot);
        }
        let (flags, mode, fcsr) = (next(4)?, next(4)?, next(4)?);
        if let Some(held) = s.csrs.get_mut(&FCSR) {
            *held = flags.map_or(*held, |v| *held & !0x1f | v & 0x1f);
            *held = mode.map_or(*held, |v| *held & !0xe0 | (v & 7) << 5);
            *held = fcsr.unwrap_or(*held);
        }
        for (_, number) in CSRS {
            let value = next(8)?;
            if let (Some(value), Some(held)) = (value, s.csrs.get_mut(&number)) {
                *held = value;
            }
        }
        if let Some(privilege) = next(8)? {
            s.privilege = u8::try_from(privilege).ok()?;
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> CpuState {
        let mut s = State { pc: 0x8020_0000, privilege: 1, ..State::default() };
        s.x = std::array::from_fn(|n| n as u64 * 3);
        s.csrs = [(FCSR, 0x41), (0x141, 9), (0x344, 0)].into();
        CpuState::Riscv64(Box::new(s))
    }

    #[test]
    fn as_many_bytes_as_the_description_says() {
        let sizes = Riscv::description().split("bitsize=\"").skip(1);
        let bits: usize =
            sizes.map(|s| s.split('"').next().and_then(|n| n.parse::<usize>().ok()).expect("a size")).sum();
        assert_eq!(Riscv::read(&state()).expect("RISC-V").len(), bits / 8);
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else_changes() {
        let before = state();
        let mut after = before.clone();
        let all = Riscv::read(&before).expect("RISC-V");
        let mut bytes: Vec<u8> = all.iter().map(|b| b.unwrap_or(0)).collect();
        Riscv::write(&mut after, &bytes).expect("enough");
        assert_eq!(after, before, "nothing was changed");
        bytes[8 * 10] = 0xaa; // a0
        bytes[8 * 65 + 4] = 5; // frm
        Riscv::write(&mut after, &bytes).expect("enough");
        let s = of(&after).expect("RISC-V");
        assert_eq!((s.x[10], s.csrs[&FCSR]), (0xaa, 0xa1));
        assert_eq!(s.csrs.len(), 3, "no CSR came from nowhere");
        assert_eq!(Riscv::write(&mut after, &bytes[..100]), None, "too few");
    }
}
