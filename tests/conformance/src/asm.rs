//! Guests as code: the way from reset into each mode, descriptor tables, and what programs share.

use iced_x86::BlockEncoderOptions;
use iced_x86::IcedError;
use iced_x86::code_asm::{
    AsmRegister32, CodeAssembler, CodeLabel, al, ax, dword_ptr, dx, eax, ptr, r8, rax, rsp,
};

/// Every vCPU starts here in real mode: the boot one by the host, others by SIPI vector 1.
pub const ENTRY: u64 = 0x1000;
/// Global descriptor table.
const GDT: u64 = 0x2000;
/// Task state segment, for the ring 0 stack.
const TSS: u64 = 0x2100;
/// Where LGDT finds its operand.
const GDTR: u64 = 0x2800;
/// Where LIDT finds its operand.
pub const IDTR: u64 = 0x2810;
/// Interrupt descriptor table.
const IDT: u64 = 0x3000;
/// Page tables: PML4, PDPT, four page directories of 2 MiB pages that map the first 4 GiB.
const PML4: u64 = 0x4000;
/// Protected-mode and long-mode code.
pub const CODE: u64 = 0x1_0000;
/// Data that guests use as they like, up to [`RAM`].
pub const DATA: u64 = 0x2_0000;
/// Bytes of RAM.
pub const RAM: u64 = 0x20_0000;
/// Top of the boot vCPU's stack; the other's is a page below.
pub const STACK: u64 = 0x1_f000;
/// Local APIC.
pub const LAPIC: u64 = 0xfee0_0000;
/// IOAPIC.
pub const IOAPIC: u64 = 0xfec0_0000;

/// Port: bytes of output.
pub const OUT: u16 = 0xe9;
/// Port: a number of output, in hexadecimal with as many digits as the access is wide.
pub const HEX: u16 = 0xec;
/// Port: the guest is done.
pub const DONE: u16 = 0xf4;
/// Port: the host is to act, and the guest waits until it has.
pub const STOP: u16 = 0xf5;
/// Port: bit 7 is the level, the rest a GSI.
pub const GSI: u16 = 0xf6;
/// Port: raises (1) or lowers (0) LINT1 of the vCPU that writes.
pub const LINT1: u16 = 0xf7;
/// Ports: MSI vector: address, data, command (see the rig).
pub const MSI: u16 = 0x210;
/// Ports: a device that answers with a pattern and writes down every access.
pub const ECHO: u16 = 0x300;
/// The same in memory.
pub const ECHO_MMIO: u64 = 0xd000_0000;

/// Selectors: 64-bit code, data, 32-bit code, user code, user data.
pub const CS64: u16 = 0x08;
/// Data.
pub const DS: u16 = 0x10;
/// 32-bit code.
pub const CS32: u16 = 0x18;
/// 64-bit code for ring 3.
const USER_CS: u16 = 0x2b;
/// Data for ring 3.
const USER_DS: u16 = 0x33;
const TSS_SELECTOR: u16 = 0x38;

const DESCRIPTORS: [u64; 9] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0,
    0x00af_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x0000_8900_0000_0067 | TSS << 16,
    0,
];

/// Bytes and where they go.
#[derive(Debug, Clone, Default)]
pub struct Image(pub Vec<(u64, Vec<u8>)>);

/// A program under construction.
pub struct Program {
    /// The instructions so far.
    pub a: CodeAssembler,
    bits: u32,
    gates: Vec<(u8, CodeLabel, u8)>,
    unexpected: CodeLabel,
}

/// What building steps return.
pub type Step = Result<(), IcedError>;

impl Program {
    /// Catches `vector` at `handler`.
    pub fn gate(&mut self, vector: u8, handler: CodeLabel) {
        self.gates.push((vector, handler, 0));
    }

    /// The same, for software interrupts of ring 3.
    pub fn user_gate(&mut self, vector: u8, handler: CodeLabel) {
        self.gates.push((vector, handler, 3));
    }

    /// Writes `text`.
    pub fn print(&mut self, text: &str) -> Step {
        for byte in text.bytes() {
            self.a.mov(al, i32::from(byte))?;
            self.a.out(i32::from(OUT as u8), al)?;
        }
        Ok(())
    }

    /// Writes EAX in hexadecimal.
    pub fn print_eax(&mut self) -> Step {
        self.a.out(i32::from(HEX as u8), eax)
    }

    /// Writes AL in hexadecimal.
    pub fn print_al(&mut self) -> Step {
        self.a.out(i32::from(HEX as u8), al)
    }

    /// Writes AL to a port below 256.
    pub fn out_byte(&mut self, port: u16, value: u8) -> Step {
        self.a.mov(al, i32::from(value))?;
        self.a.out(i32::from(port as u8), al)
    }

    /// Writes a doubleword to any port.
    pub fn out_long(&mut self, port: u16, value: u32) -> Step {
        self.a.mov(dx, i32::from(port))?;
        self.a.mov(eax, value)?;
        self.a.out(dx, eax)
    }

    /// Says that the guest is done.
    pub fn done(&mut self) -> Step {
        self.out_byte(DONE, 0)?;
        self.halt()
    }

    /// Stops for good.
    pub fn halt(&mut self) -> Step {
        let mut forever = self.a.create_label();
        self.a.set_label(&mut forever)?;
        self.a.cli()?;
        self.a.hlt()?;
        self.a.jmp(forever)
    }

    /// Writes `value` to a 32-bit register in memory. Long mode; uses R8 and EAX.
    pub fn poke(&mut self, address: u64, value: u32) -> Step {
        self.a.mov(r8, address)?;
        self.a.mov(eax, value)?;
        self.a.mov(dword_ptr(r8), eax)
    }

    /// Reads a 32-bit register in memory into `to`. Long mode; uses R8.
    pub fn peek(&mut self, to: AsmRegister32, address: u64) -> Step {
        self.a.mov(r8, address)?;
        self.a.mov(to, dword_ptr(r8))
    }

    /// Acknowledges an interrupt at the local APIC. Saves what it uses.
    pub fn eoi(&mut self) -> Step {
        self.a.push(rax)?;
        self.a.push(r8)?;
        self.poke(LAPIC + 0xb0, 0)?;
        self.a.pop(r8)?;
        self.a.pop(rax)
    }

    /// Switches the local APIC on, with spurious vector 0xff and all priorities let through.
    pub fn enable_lapic(&mut self) -> Step {
        self.poke(LAPIC + 0x80, 0)?;
        self.poke(LAPIC + 0xf0, 0x1ff)
    }

    /// Writes an IOAPIC register.
    pub fn ioapic(&mut self, index: u32, value: u32) -> Step {
        self.poke(IOAPIC, index)?;
        self.poke(IOAPIC + 0x10, value)
    }

    /// Goes to `target` in ring 3, with a stack of its own. Uses RAX.
    pub fn to_ring3(&mut self, target: CodeLabel) -> Step {
        self.a.mov(eax, u32::from(TSS_SELECTOR))?;
        self.a.ltr(ax)?;
        self.a.mov(rax, u64::from(USER_DS))?;
        self.a.push(rax)?;
        self.a.mov(rax, DATA + 0x1000)?;
        self.a.push(rax)?;
        self.a.pushfq()?;
        self.a.mov(rax, u64::from(USER_CS))?;
        self.a.push(rax)?;
        self.a.lea(rax, ptr(target))?;
        self.a.push(rax)?;
        self.a.iretq()
    }

    /// Masks both 8259s.
    pub fn mask_pics(&mut self) -> Step {
        self.out_byte(0x21, 0xff)?;
        self.out_byte(0xa1, 0xff)
    }

    /// Programs both 8259s: vectors from `base` and `base + 8`, everything but `unmasked` masked.
    pub fn init_pics(&mut self, base: u8, unmasked: u16) -> Step {
        for (port, vector, wiring, mask) in
            [(0x20, base, 4, !unmasked as u8), (0xa0, base + 8, 2, (!unmasked >> 8) as u8)]
        {
            self.out_byte(port, 0x11)?;
            self.out_byte(port + 1, vector)?;
            self.out_byte(port + 1, wiring)?;
            self.out_byte(port + 1, 1)?;
            self.out_byte(port + 1, mask)?;
        }
        Ok(())
    }
}

fn le(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn table_register(limit: u16, base: u64) -> Vec<u8> {
    let mut bytes = limit.to_le_bytes().to_vec();
    bytes.extend(base.to_le_bytes());
    bytes
}

/// The identity map of 4 GiB: uncached where devices are.
fn page_tables(image: &mut Image) {
    // Present, writable, user.
    const TABLE: u64 = 7;
    image.0.push((PML4, le(&[PML4 + 0x1000 + TABLE])));
    let directories: Vec<u64> = (0..4).map(|n| PML4 + 0x2000 + n * 0x1000 + TABLE).collect();
    image.0.push((PML4 + 0x1000, le(&directories)));
    let uncached = |at: u64| if at >= 0xc000_0000 { 0x18 } else { 0 };
    let pages: Vec<u64> = (0..2048u64).map(|n| n << 21 | 0x87 | uncached(n << 21)).collect();
    image.0.push((PML4 + 0x2000, le(&pages)));
}

/// The page directory entry of the 2 MiB page that holds `gva`.
pub fn directory_entry(gva: u64) -> u64 {
    PML4 + 0x2000 + (gva >> 21) * 8
}

/// From real mode to `target` with the tables above; in long mode if `long`.
fn prologue(long: bool, target: u64) -> Vec<u8> {
    let mut code = vec![
        0xfa, // cli
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0x66, 0x0f, 0x01, 0x16, // lgdt [GDTR]
    ];
    code.extend((GDTR as u16).to_le_bytes());
    if long {
        code.extend([0x66, 0xb8, 0x20, 0, 0, 0, 0x0f, 0x22, 0xe0]); // mov eax, PAE; mov cr4, eax
        code.extend([0x66, 0xb8]); // mov eax, PML4
        code.extend((PML4 as u32).to_le_bytes());
        code.extend([0x0f, 0x22, 0xd8]); // mov cr3, eax
        code.extend([0x66, 0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32]); // mov ecx, EFER; rdmsr
        code.extend([0x66, 0x0d, 0, 1, 0, 0, 0x0f, 0x30]); // or eax, LME; wrmsr
    }
    code.extend([0x0f, 0x20, 0xc0, 0x66, 0x0d]); // mov eax, cr0; or eax, PE or PG|PE
    code.extend(if long { 0x8000_0001u32 } else { 1 }.to_le_bytes());
    code.extend([0x0f, 0x22, 0xc0, 0x66, 0xea]); // mov cr0, eax; jmp far
    code.extend((target as u32).to_le_bytes());
    code.extend(if long { CS64 } else { CS32 }.to_le_bytes());
    code
}

fn gate_words(bits: u32, target: u64, dpl: u8) -> Vec<u64> {
    let selector = u64::from(if bits == 64 { CS64 } else { CS32 });
    let low = target & 0xffff
        | selector << 16
        | 0x8e00 << 32
        | u64::from(dpl) << 45
        | (target >> 16 & 0xffff) << 48;
    if bits == 64 { vec![low, target >> 32] } else { vec![low] }
}

fn build(bits: u32, body: impl FnOnce(&mut Program) -> Step) -> Result<Image, IcedError> {
    let mut a = CodeAssembler::new(bits)?;
    let unexpected = a.create_label();
    let mut p = Program { a, bits, gates: Vec::new(), unexpected };
    start_of(&mut p)?;
    body(&mut p)?;
    // An exception that no gate catches: say so, with what is on the stack.
    p.a.set_label(&mut p.unexpected)?;
    p.print("!")?;
    for _ in 0..3 {
        if bits == 64 {
            p.a.pop(rax)?
        } else {
            p.a.pop(eax)?
        }
        p.print_eax()?;
    }
    p.done()?;
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let result = p.a.assemble_options(CODE, options)?;
    let mut vectors: Vec<(u64, u8)> = vec![(result.label_ip(&p.unexpected)?, 0); 32];
    vectors.resize(256, (0, 0));
    for (vector, label, dpl) in &p.gates {
        vectors[usize::from(*vector)] = (result.label_ip(label)?, *dpl);
    }
    let idt: Vec<u64> = vectors
        .iter()
        .flat_map(|(target, dpl)| match target {
            0 => vec![0; bits as usize / 32],
            _ => gate_words(bits, *target, *dpl),
        })
        .collect();
    let mut image = Image::default();
    image.0.push((ENTRY, prologue(bits == 64, CODE)));
    image.0.push((GDT, le(&DESCRIPTORS)));
    image.0.push((TSS + 4, le(&[STACK])));
    image.0.push((GDTR, table_register(DESCRIPTORS.len() as u16 * 8 - 1, GDT)));
    image.0.push((IDTR, table_register(idt.len() as u16 * 8 - 1, IDT)));
    image.0.push((IDT, le(&idt)));
    if bits == 64 {
        page_tables(&mut image);
    }
    image.0.push((CODE, result.inner.code_buffer));
    Ok(image)
}

/// Segments, stack, IDT and task register.
fn start_of(p: &mut Program) -> Step {
    use iced_x86::code_asm::{ax, ds, edi, es, esp, fs, gs, ptr, ss};
    p.a.mov(eax, u32::from(DS))?;
    for segment in [ds, es, ss, fs, gs] {
        p.a.mov(segment, ax)?;
    }
    if p.bits == 64 {
        // The second vCPU has its own stack: bit 24 of the APIC id register.
        p.a.mov(r8, LAPIC + 0x20)?;
        p.a.mov(edi, dword_ptr(r8))?;
        p.a.shr(edi, 24)?;
        p.a.mov(eax, edi)?;
        p.a.shl(eax, 12)?;
        p.a.mov(rsp, STACK)?;
        p.a.sub(rsp, rax)?;
    } else {
        p.a.mov(esp, STACK as u32)?;
    }
    p.a.mov(eax, IDTR as u32)?;
    if p.bits == 64 { p.a.lidt(ptr(rax)) } else { p.a.lidt(ptr(eax)) }
}

/// A guest in long mode. Its body starts with EDI holding the vCPU's APIC id, interrupts off.
///
/// # Errors
/// If it does not assemble.
pub fn long_mode(body: impl FnOnce(&mut Program) -> Step) -> Result<Image, IcedError> {
    build(64, body)
}

/// A guest in 32-bit protected mode without paging.
///
/// # Errors
/// If it does not assemble.
pub fn protected_mode(body: impl FnOnce(&mut Program) -> Step) -> Result<Image, IcedError> {
    build(32, body)
}

/// A guest in real mode; `vectors` of the interrupt vector table point to labels that `body` returns.
///
/// # Errors
/// If it does not assemble.
pub fn real_mode(
    body: impl FnOnce(&mut Program) -> Result<Vec<(u8, CodeLabel)>, IcedError>,
) -> Result<Image, IcedError> {
    use iced_x86::code_asm::{ax, ds, es, sp, ss};
    let mut a = CodeAssembler::new(16)?;
    let unexpected = a.create_label();
    let mut p = Program { a, bits: 16, gates: Vec::new(), unexpected };
    p.a.cli()?;
    p.a.xor(ax, ax)?;
    for segment in [ds, es, ss] {
        p.a.mov(segment, ax)?;
    }
    p.a.mov(sp, 0xf000)?;
    let vectors = body(&mut p)?;
    let result = p.a.assemble_options(ENTRY, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let mut image = Image::default();
    for (vector, label) in vectors {
        let target = result.label_ip(&label)? as u32;
        image.0.push((u64::from(vector) * 4, target.to_le_bytes().to_vec()));
    }
    image.0.push((ENTRY, result.inner.code_buffer));
    Ok(image)
}
