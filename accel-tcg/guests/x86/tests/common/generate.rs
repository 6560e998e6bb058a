//! Sequences of instructions.

use std::collections::HashMap;

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, RflagsBits};

use super::case::{CODE, Case, Role};
use super::compare::Undefined;
use super::emit::Emit;
use super::random::Random;
use super::templates::{Templates, is_string};

/// Runs and faults of a code.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    /// Times it went past its end.
    pub retired: u64,
    /// Times it raised an exception.
    pub faulted: u64,
}

/// Makes cases.
pub struct Generator {
    templates: [Templates; 2],
    random: Random,
    /// What became of each code, in 32- and 64-bit mode.
    pub seen: HashMap<(u32, Code), Seen>,
    next: usize,
}

/// A sequence under way.
struct Draft {
    code: Vec<u8>,
    /// Instructions with their offsets.
    insns: Vec<(usize, Instruction)>,
    /// Status flags that are undefined so far.
    undefined: Undefined,
}

impl Generator {
    /// A generator that starts from `seed`.
    pub fn new(seed: u64) -> Self {
        Self::with(seed, false)
    }

    /// One with AVX-512, of those codes that are `wanted`.
    pub fn wide(seed: u64, wanted: impl Fn(Code) -> bool) -> Self {
        let mut this = Self::with(seed, true);
        this.templates.iter_mut().for_each(|t| t.retain(&wanted));
        this
    }

    fn with(seed: u64, wide: bool) -> Self {
        Self {
            templates: [Templates::new(64, wide), Templates::new(32, wide)],
            random: Random::new(seed),
            seen: HashMap::new(),
            next: seed as usize,
        }
    }

    /// A generator of 64-bit code of the codes that are `wanted`.
    pub fn of(seed: u64, wanted: impl Fn(Code) -> bool) -> Self {
        let mut this = Self::new(seed);
        this.templates[0].retain(wanted);
        this.templates[1].retain(|_| false);
        this
    }

    /// The codes of 64- or 32-bit code.
    pub fn codes(&self, bits: u32) -> &[Code] {
        &self.templates[usize::from(bits == 32)].codes
    }

    fn roles(&mut self) -> [Role; 16] {
        let mut roles = [Role::Any; 16];
        roles[4] = Role::Pointer;
        for index in [6, 7] {
            if self.random.percent(75) {
                roles[index] = Role::Pointer;
            }
        }
        if self.random.percent(60) {
            roles[1] = Role::Small;
        }
        for _ in 0..3 {
            let index = self.random.below(16) as usize;
            if roles[index] == Role::Any {
                roles[index] = if self.random.percent(60) { Role::Pointer } else { Role::Small };
            }
        }
        let low = [0, 2, 3, 5][self.random.below(4) as usize];
        roles[low] = Role::Pointer;
        roles
    }

    /// A case of `code` alone.
    pub fn case_of(&mut self, bits: u32, code: Code, at: usize) -> Case {
        let which = usize::from(bits == 32);
        let roles = self.roles();
        let mut draft = Draft { code: Vec::new(), insns: Vec::new(), undefined: Undefined::default() };
        self.append(which, code, &roles, at, &mut draft);
        self.aim(&mut draft);
        Case { bits, at, code: draft.code, roles, seed: self.random.next(), wide: self.templates[which].wide }
    }

    /// The next case, at offset `at` of the code area.
    pub fn case(&mut self, at: usize) -> Case {
        let which = usize::from(self.random.percent(25) && !self.templates[1].codes.is_empty());
        let bits = [64, 32][which];
        let roles = self.roles();
        let wanted = 1 + self.random.below(8) as usize;
        let main = self.random.below(wanted as u64) as usize;
        let mut draft = Draft { code: Vec::new(), insns: Vec::new(), undefined: Undefined::default() };
        for index in 0..wanted {
            let code = if index == main {
                self.next += 1;
                let codes = &self.templates[which].codes;
                codes[self.next % codes.len()]
            } else if self.random.percent(55) {
                self.integer(which)
            } else {
                let codes = &self.templates[which].codes;
                codes[self.random.below(codes.len() as u64) as usize]
            };
            let seen = self.seen.get(&(bits, code)).copied().unwrap_or_default();
            let last = seen.faulted > 20 && seen.retired < seen.faulted;
            if last && index + 1 != wanted && index != main {
                continue;
            }
            self.append(which, code, &roles, at, &mut draft);
            if last {
                break;
            }
        }
        self.aim(&mut draft);
        Case { bits, at, code: draft.code, roles, seed: self.random.next(), wide: self.templates[which].wide }
    }

    /// A code that works on flags.
    fn integer(&mut self, which: usize) -> Code {
        use Mnemonic as M;
        let codes = &self.templates[which].codes;
        for _ in 0..64 {
            let code = codes[self.random.below(codes.len() as u64) as usize];
            let flow = code.flow_control();
            if flow == FlowControl::ConditionalBranch
                || code.is_jcc_short_or_near()
                || matches!(
                    code.mnemonic(),
                    M::Add
                        | M::Adc
                        | M::Sub
                        | M::Sbb
                        | M::Cmp
                        | M::Test
                        | M::And
                        | M::Or
                        | M::Xor
                        | M::Inc
                        | M::Dec
                        | M::Neg
                        | M::Shl
                        | M::Shr
                        | M::Sar
                        | M::Rol
                        | M::Ror
                        | M::Rcl
                        | M::Rcr
                        | M::Imul
                        | M::Mul
                        | M::Bt
                        | M::Bts
                        | M::Btr
                        | M::Btc
                        | M::Cmc
                        | M::Clc
                        | M::Stc
                        | M::Lahf
                        | M::Sahf
                        | M::Shld
                        | M::Shrd
                        | M::Xadd
                        | M::Cmpxchg
                        | M::Adcx
                        | M::Adox
                        | M::Setb
                        | M::Sete
                        | M::Setl
                        | M::Setbe
                        | M::Seto
                        | M::Setp
                        | M::Cmovb
                        | M::Cmovle
                        | M::Cmove
                        | M::Cmovs
                )
            {
                return code;
            }
        }
        codes[0]
    }

    fn append(&mut self, which: usize, code: Code, roles: &[Role; 16], at: usize, draft: &mut Draft) {
        let templates = &self.templates[which];
        let all = templates.of(code);
        if all.is_empty() {
            return;
        }
        for _ in 0..12 {
            let template = self.random.pick(all);
            let ip = CODE + (at + draft.code.len()) as u64;
            let mut emit = Emit { random: &mut self.random, roles, bits: templates.bits, ip };
            let Some((bytes, insn)) = emit.insn(&template) else { continue };
            if insn.code() != code && !insn.has_lock_prefix()
                || !super::templates::wanted(insn.code(), templates.wide)
            {
                continue;
            }
            // 90 with REX.B is XCHG, whatever is before it.
            if insn.code() == Code::Pause && bytes.len() > 2 {
                continue;
            }
            if insn.rflags_read() & draft.undefined.flags != 0 {
                continue;
            }
            if spoils_pointer(&insn, roles) && self.random.percent(75) {
                continue;
            }
            draft.undefined.pass(&insn);
            draft.insns.push((draft.code.len(), insn));
            draft.code.extend_from_slice(&bytes);
            return;
        }
    }

    /// Points branches at later instructions of the sequence.
    fn aim(&mut self, draft: &mut Draft) {
        let starts: Vec<usize> =
            draft.insns.iter().map(|i| i.0).chain(std::iter::once(draft.code.len())).collect();
        for (index, (start, insn)) in draft.insns.iter().enumerate() {
            let near =
                matches!(insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
            if !near {
                continue;
            }
            let size = relative_size(insn);
            let behind = start + insn.len();
            let to = starts[index + 1 + self.random.below((starts.len() - index - 1) as u64) as usize];
            let distance = (to - behind) as u32;
            draft.code[behind - size..behind].copy_from_slice(&distance.to_le_bytes()[..size]);
        }
    }
}

/// Bytes of a near branch's displacement.
fn relative_size(insn: &Instruction) -> usize {
    if insn.is_jmp_short() || insn.is_jcc_short() || insn.is_loop() || insn.is_loopcc() || insn.is_jcx_short()
    {
        1
    } else if insn.op0_kind() == OpKind::NearBranch16 {
        2
    } else {
        4
    }
}

/// True if a register that memory operands count on is overwritten.
fn spoils_pointer(insn: &Instruction, roles: &[Role; 16]) -> bool {
    let register = insn.op0_register();
    insn.op0_kind() == OpKind::Register
        && register.is_gpr()
        && !matches!(insn.mnemonic(), Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Bt | Mnemonic::Push)
        && roles[register.full_register().number() & 15] == Role::Pointer
}

/// The undefined flags behind `insn`.
pub fn undefined_after(before: u32, insn: &Instruction) -> u32 {
    use Mnemonic as M;
    // Those whose count may be zero may leave flags as they are.
    let may_not = matches!(
        insn.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    ) || is_string(insn.mnemonic());
    let written = insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set();
    let kept = if may_not { before } else { before & !written };
    kept | insn.rflags_undefined()
}

/// The RFLAGS bits of iced's.
pub fn rflags_mask(bits: u32) -> u64 {
    let table = [
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 1 << 2),
        (RflagsBits::AF, 1 << 4),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::OF, 1 << 11),
    ];
    table.iter().filter(|(b, _)| bits & b != 0).map(|(_, m)| m).sum()
}
