//! Registers of x86-64 guests: gdb's standard features, and the control registers as one of our own.

use std::fmt::Write;
use std::sync::OnceLock;

use holdfast_arch::CpuState;
use holdfast_arch::x86_64::State;

use super::target::Registers;

/// The architecture.
#[derive(Debug)]
pub(super) struct X86;

/// gdb's order of [`State::gpr`].
const GPR: [(&str, usize); 16] = [
    ("rax", 0),
    ("rbx", 3),
    ("rcx", 1),
    ("rdx", 2),
    ("rsi", 6),
    ("rdi", 7),
    ("rbp", 5),
    ("rsp", 4),
    ("r8", 8),
    ("r9", 9),
    ("r10", 10),
    ("r11", 11),
    ("r12", 12),
    ("r13", 13),
    ("r14", 14),
    ("r15", 15),
];

/// gdb's order of [`State::segments`].
const SEGMENTS: [(&str, usize); 6] = [("cs", 1), ("ss", 2), ("ds", 3), ("es", 0), ("fs", 4), ("gs", 5)];

const X87: [&str; 8] = ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"];

/// Our own feature.
const SYSTEM: [&str; 7] = ["k_gs_base", "cr0", "cr2", "cr3", "cr4", "cr8", "efer"];

/// IA32_KERNEL_GS_BASE.
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Places in the XSAVE area (SDM volume 1, sections 10.5.1 and 13.4).
mod area {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const XSTATE_BV: usize = 512;
    pub const YMM_HIGH: usize = 576;
    /// Bytes up to the end of the AVX state.
    pub const LEN: usize = 832;
    /// Bits of XSTATE_BV.
    pub const X87_BIT: u64 = 1;
    pub const SSE_BIT: u64 = 2;
    pub const AVX_BIT: u64 = 4;
}

const SSE_TYPES: &str = r#"<vector id="v4f" type="ieee_single" count="4"/>
<vector id="v2d" type="ieee_double" count="2"/><vector id="v16i8" type="int8" count="16"/>
<vector id="v8i16" type="int16" count="8"/><vector id="v4i32" type="int32" count="4"/>
<vector id="v2i64" type="int64" count="2"/>
<union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>
<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/>
<field name="v2_int64" type="v2i64"/><field name="uint128" type="uint128"/></union>
<flags id="i386_mxcsr" size="4"><field name="IE" start="0" end="0"/><field name="DE" start="1" end="1"/>
<field name="ZE" start="2" end="2"/><field name="OE" start="3" end="3"/><field name="UE" start="4" end="4"/>
<field name="PE" start="5" end="5"/><field name="DAZ" start="6" end="6"/><field name="IM" start="7" end="7"/>
<field name="DM" start="8" end="8"/><field name="ZM" start="9" end="9"/><field name="OM" start="10" end="10"/>
<field name="UM" start="11" end="11"/><field name="PM" start="12" end="12"/><field name="FZ" start="15" end="15"/>
</flags>"#;

const FLAGS: &str = r#"<flags id="i386_eflags" size="4"><field name="CF" start="0" end="0"/>
<field name="" start="1" end="1"/><field name="PF" start="2" end="2"/><field name="AF" start="4" end="4"/>
<field name="ZF" start="6" end="6"/><field name="SF" start="7" end="7"/><field name="TF" start="8" end="8"/>
<field name="IF" start="9" end="9"/><field name="DF" start="10" end="10"/><field name="OF" start="11" end="11"/>
<field name="NT" start="14" end="14"/><field name="RF" start="16" end="16"/><field name="VM" start="17" end="17"/>
<field name="AC" start="18" end="18"/><field name="VIF" start="19" end="19"/><field name="VIP" start="20" end="20"/>
<field name="ID" start="21" end="21"/></flags>"#;

/// Writing to a String cannot fail.
fn reg(text: &mut String, name: &str, bits: u32, kind: &str) {
    let _ = writeln!(text, r#"<reg name="{name}" bitsize="{bits}" type="{kind}"/>"#);
}

fn describe() -> String {
    let mut t = String::from(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target>\
         <architecture>i386:x86-64</architecture><feature name=\"org.gnu.gdb.i386.core\">\n",
    );
    t += FLAGS;
    for (name, _) in GPR {
        reg(&mut t, name, 64, if matches!(name, "rbp" | "rsp") { "data_ptr" } else { "int64" });
    }
    reg(&mut t, "rip", 64, "code_ptr");
    reg(&mut t, "eflags", 32, "i386_eflags");
    SEGMENTS.iter().for_each(|(name, _)| reg(&mut t, name, 32, "int32"));
    (0..8).for_each(|n| reg(&mut t, &format!("st{n}"), 80, "i387_ext"));
    X87.iter().for_each(|name| reg(&mut t, name, 32, "int"));
    t += "</feature><feature name=\"org.gnu.gdb.i386.sse\">\n";
    t += SSE_TYPES;
    (0..16).for_each(|n| reg(&mut t, &format!("xmm{n}"), 128, "vec128"));
    reg(&mut t, "mxcsr", 32, "i386_mxcsr");
    t += "</feature><feature name=\"org.gnu.gdb.i386.segments\">\n";
    reg(&mut t, "fs_base", 64, "int");
    reg(&mut t, "gs_base", 64, "int");
    t += "</feature><feature name=\"org.gnu.gdb.i386.avx\">\n";
    (0..16).for_each(|n| reg(&mut t, &format!("ymm{n}h"), 128, "uint128"));
    t += "</feature><feature name=\"org.holdfast.x86.system\">\n";
    SYSTEM.iter().for_each(|name| reg(&mut t, name, 64, "int64"));
    t += "</feature></target>";
    t
}

/// Goes over all registers in order. `field` gets the bytes of each, to be read or written.
fn walk(s: &mut State, field: &mut dyn FnMut(&mut [u8]) -> Option<()>) -> Option<()> {
    let mut number = |value: &mut u64, len: usize| {
        let mut bytes = value.to_le_bytes();
        field(&mut bytes[..len])?;
        *value = u64::from_le_bytes(bytes);
        Some(())
    };
    for (_, n) in GPR {
        number(&mut s.gpr[n], 8)?;
    }
    number(&mut s.rip, 8)?;
    number(&mut s.rflags, 4)?;
    for (_, n) in SEGMENTS {
        // Not loaded: a selector does not make a segment.
        let mut selector = u64::from(s.segments[n].selector);
        number(&mut selector, 4)?;
    }
    let mut vectors = Area::of(s);
    let [st, x87, xmm, mxcsr, high] = vectors.split();
    for st in st.chunks_exact_mut(16) {
        field(&mut st[..10])?;
    }
    for value in x87.chunks_exact_mut(4).chain(xmm.chunks_exact_mut(16)).chain([mxcsr]) {
        field(value)?;
    }
    for n in [4, 5] {
        field_of(&mut s.segments[n].base, field)?;
    }
    for value in high.chunks_exact_mut(16) {
        field(value)?;
    }
    vectors.store(s);
    let mut kernel_gs = s.msrs.get(&KERNEL_GS_BASE).copied().unwrap_or(0);
    field_of(&mut kernel_gs, field)?;
    if let Some(value) = s.msrs.get_mut(&KERNEL_GS_BASE) {
        *value = kernel_gs;
    }
    s.cr.iter_mut().chain([&mut s.efer]).try_for_each(|value| field_of(value, field))
}

fn field_of(value: &mut u64, field: &mut dyn FnMut(&mut [u8]) -> Option<()>) -> Option<()> {
    let mut bytes = value.to_le_bytes();
    field(&mut bytes)?;
    *value = u64::from_le_bytes(bytes);
    Some(())
}

/// x87, SSE and AVX state, as gdb lays it out.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Area {
    st: [u8; 128],
    x87: [u8; 32],
    xmm: [u8; 256],
    mxcsr: [u8; 4],
    high: [u8; 256],
}

fn get<const N: usize>(area: &[u8], at: usize) -> [u8; N] {
    area.get(at..at + N).and_then(|b| b.try_into().ok()).unwrap_or([0; N])
}

impl Area {
    fn split(&mut self) -> [&mut [u8]; 5] {
        [&mut self.st, &mut self.x87, &mut self.xmm, &mut self.mxcsr, &mut self.high]
    }

    fn of(s: &State) -> Self {
        let a = &s.xsave;
        // What XSTATE_BV says is not there is as after reset.
        let bits = u64::from_le_bytes(get(a, area::XSTATE_BV));
        let mut this =
            Self { st: [0; 128], x87: [0; 32], xmm: [0; 256], mxcsr: get(a, area::MXCSR), high: [0; 256] };
        let (mut control, mut status, mut tags) = (0x37f, 0, 0_u8);
        if bits & area::X87_BIT != 0 {
            this.st = get(a, area::ST);
            (control, status) =
                (u16::from_le_bytes(get(a, area::FCW)), u16::from_le_bytes(get(a, area::FSW)));
            tags = get::<1>(a, area::FTW)[0];
            for (n, at) in [(7, area::FOP), (4, area::FIP), (6, area::FDP)] {
                let value: [u8; 4] = get(a, at);
                let len = if n == 7 { 2 } else { 4 };
                this.x87[4 * n..4 * n + len].copy_from_slice(&value[..len]);
            }
        }
        if bits & area::SSE_BIT != 0 {
            this.xmm = get(a, area::XMM);
        }
        if bits & area::AVX_BIT != 0 {
            this.high = get(a, area::YMM_HIGH);
        }
        // The full tag word; zero and special are not told apart from valid.
        let full = (0..8).filter(|n| tags >> n & 1 == 0).fold(0_u16, |all, n| all | 3 << (2 * n));
        for (n, value) in [control, status, full].into_iter().enumerate() {
            this.x87[4 * n..4 * n + 2].copy_from_slice(&value.to_le_bytes());
        }
        this
    }

    fn store(&self, s: &mut State) {
        if *self == Self::of(s) {
            return;
        }
        if s.xsave.len() < area::LEN {
            s.xsave.resize(area::LEN, 0);
        }
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(to) = s.xsave.get_mut(at..at + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        };
        put(area::ST, &self.st);
        put(area::FCW, &self.x87[0..2]);
        put(area::FSW, &self.x87[4..6]);
        let full = u16::from_le_bytes([self.x87[8], self.x87[9]]);
        let tags = (0..8).filter(|n| full >> (2 * n) & 3 != 3).fold(0_u8, |all, n| all | 1 << n);
        put(area::FTW, &[tags]);
        put(area::FIP, &self.x87[16..20]);
        put(area::FDP, &self.x87[24..28]);
        put(area::FOP, &self.x87[28..30]);
        put(area::XMM, &self.xmm);
        put(area::MXCSR, &self.mxcsr);
        let avx = s.xcr0 & area::AVX_BIT;
        let bits = u64::from_le_bytes(get(&s.xsave, area::XSTATE_BV)) | area::X87_BIT | area::SSE_BIT | avx;
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(to) = s.xsave.get_mut(at..at + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        };
        put(area::XSTATE_BV, &bits.to_le_bytes());
        if avx != 0 {
            put(area::YMM_HIGH, &self.high);
        }
    }
}

impl Registers for X86 {
    fn description() -> &'static str {
        static TEXT: OnceLock<String> = OnceLock::new();
        TEXT.get_or_init(describe)
    }

    fn read(state: &CpuState) -> Option<Vec<Option<u8>>> {
        let CpuState::X86_64(state) = state else { return None };
        let mut all = Vec::new();
        walk(&mut state.as_ref().clone(), &mut |bytes| {
            all.extend(bytes.iter().copied().map(Some));
            Some(())
        })?;
        Some(all)
    }

    fn write(state: &mut CpuState, mut bytes: &[u8]) -> Option<()> {
        let CpuState::X86_64(state) = state else { return None };
        walk(state, &mut |field| {
            let (now, rest) = bytes.split_at_checked(field.len())?;
            field.copy_from_slice(now);
            bytes = rest;
            Some(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> CpuState {
        let mut s =
            State { rip: 0x1234_5678_9abc, rflags: 0x202, xcr0: 7, xsave: vec![0; 1088], ..State::default() };
        s.gpr = std::array::from_fn(|n| n as u64 * 0x0101_0101_0101_0101);
        s.segments[1].selector = 0x10;
        s.msrs.insert(KERNEL_GS_BASE, 77);
        CpuState::X86_64(Box::new(s))
    }

    #[test]
    fn as_many_bytes_as_the_description_says() {
        let sizes = X86::description().split("bitsize=\"").skip(1);
        let bits: usize =
            sizes.map(|s| s.split('"').next().and_then(|n| n.parse::<usize>().ok()).expect("a size")).sum();
        assert_eq!(X86::read(&state()).expect("x86").len(), bits / 8);
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else_changes() {
        let before = state();
        let mut after = before.clone();
        let same: Vec<u8> = X86::read(&before).expect("x86").into_iter().map(|b| b.expect("there")).collect();
        X86::write(&mut after, &same).expect("enough");
        assert_eq!(after, before, "nothing was changed");
        // rbx is the second, xmm1 has 16 bytes behind 536 of general, segment and x87 registers and xmm0.
        let mut bytes = same.clone();
        bytes[8] = 0xee;
        let xmm1 = 16 * 8 + 8 + 4 + 24 + 80 + 32 + 16;
        bytes[xmm1] = 0x5a;
        X86::write(&mut after, &bytes).expect("enough");
        let CpuState::X86_64(s) = &after else { panic!("x86") };
        assert_eq!((s.gpr[3] & 0xff, s.xsave[area::XMM + 16]), (0xee, 0x5a));
        assert_eq!(u64::from_le_bytes(get(&s.xsave, area::XSTATE_BV)), 7);
        assert_eq!(X86::read(&after).expect("x86"), bytes.iter().copied().map(Some).collect::<Vec<_>>());
        assert_eq!(X86::write(&mut after, &bytes[..100]), None, "too few");
    }
}
