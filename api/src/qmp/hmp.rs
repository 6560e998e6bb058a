//! The human monitor's commands, as `human-monitor-command` runs them. Output is text, errors included.

use std::fmt::Write;

use holdfast_vmm::control::{self as ops, ControlError, ControlHandle, MemoryRead, RunState};

use crate::call;

/// Most bytes that one `x` or `xp` reads.
const MAX_READ: usize = 1 << 20;

const HELP: &str = "help -- list the commands\r\n\
    info status -- show whether the VM runs\r\n\
    info registers [-a|vcpu] -- show the vCPUs' registers\r\n\
    info mtree -- show the address spaces\r\n\
    info qtree -- show the devices\r\n\
    info jit -- show the translator's figures\r\n\
    x /fmt addr -- show guest-virtual memory\r\n\
    xp /fmt addr -- show guest-physical memory\r\n";

/// Runs `line` on vCPU `cpu`.
pub(super) async fn run(handle: &ControlHandle, line: &str, cpu: Option<u32>) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let text = match words.as_slice() {
        [] => Ok(String::new()),
        ["help" | "?", ..] | ["info"] => Ok(HELP.to_owned()),
        ["info", "status"] => call(handle, ops::QueryStatus).await.map(status),
        ["info", "registers"] => call(handle, ops::Registers(Some(cpu.unwrap_or(0)))).await,
        ["info", "registers", "-a"] => call(handle, ops::Registers(None)).await,
        ["info", "registers", vcpu] => match vcpu.parse() {
            Ok(vcpu) => call(handle, ops::Registers(Some(vcpu))).await,
            Err(_) => return format!("invalid vCPU: '{vcpu}'\r\n"),
        },
        ["info", "mtree", ..] => call(handle, ops::MemoryTree).await,
        ["info", "qtree"] => call(handle, ops::DeviceTree).await,
        ["info", "jit"] => call(handle, ops::Jit).await,
        ["info", topic, ..] => return format!("unknown command: 'info {topic}'\r\n"),
        [command, ..] if *command == "x" || command.starts_with("x/") => {
            let rest = line.trim_start().get(1..).unwrap_or_default();
            return examine(handle, rest, Some(cpu.unwrap_or(0))).await;
        }
        [command, ..] if *command == "xp" || command.starts_with("xp/") => {
            let rest = line.trim_start().get(2..).unwrap_or_default();
            return examine(handle, rest, None).await;
        }
        [command, ..] => return format!("unknown command: '{command}'\r\n"),
    };
    text.map(|text| lines(&text)).unwrap_or_else(|error| failed(&error))
}

fn failed(error: &ControlError) -> String {
    format!("Error: {}\r\n", error.describe())
}

/// Ends every line as the monitor does.
fn lines(text: &str) -> String {
    text.lines().flat_map(|line| [line, "\r\n"]).collect()
}

fn status(state: RunState) -> String {
    let name = serde_json::to_value(state).ok();
    match (state, name.as_ref().and_then(|name| name.as_str())) {
        (RunState::Running, _) => "VM status: running".to_owned(),
        (RunState::Paused, _) | (_, None) => "VM status: paused".to_owned(),
        (_, Some(name)) => format!("VM status: paused ({name})"),
    }
}

/// How memory is shown: `/count format size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Format {
    count: usize,
    letter: char,
    size: usize,
}

/// Reads `/NFU addr`.
fn parse(text: &str) -> Result<(Format, u64), String> {
    let text = text.trim_start();
    let (format, address) = match text.strip_prefix('/') {
        Some(rest) => rest.split_once(char::is_whitespace).unwrap_or((rest, "")),
        None => ("", text),
    };
    let digits = format.bytes().take_while(u8::is_ascii_digit).count();
    let (count, letters) = format.split_at(digits);
    let count =
        if count.is_empty() { 1 } else { count.parse().map_err(|_| format!("invalid count: '{count}'"))? };
    let mut parsed = Format { count, letter: 'x', size: 4 };
    for letter in letters.chars() {
        match letter {
            'x' | 'd' | 'u' | 'o' | 'c' => parsed.letter = letter,
            'b' => parsed.size = 1,
            'h' => parsed.size = 2,
            'w' => parsed.size = 4,
            'g' => parsed.size = 8,
            'i' => return Err("format 'i' is not supported by this version".to_owned()),
            other => return Err(format!("invalid char in format: '{other}'")),
        }
    }
    if parsed.letter == 'c' {
        parsed.size = 1;
    }
    if parsed.count.saturating_mul(parsed.size) > MAX_READ {
        return Err(format!("at most {MAX_READ} bytes can be shown"));
    }
    Ok((parsed, expression(address.trim())?))
}

/// Whether `text` is what stands behind `x` or `xp`.
pub(super) fn reads(text: &str) -> bool {
    parse(text).is_ok()
}

/// Sums and differences of numbers.
fn expression(text: &str) -> Result<u64, String> {
    let invalid = || format!("invalid address: '{text}'");
    let mut sum = 0_u64;
    let mut rest = text;
    let mut negative = false;
    loop {
        let end = rest.find(['+', '-']).unwrap_or(rest.len());
        let (term, tail) = rest.split_at(end);
        let value = number(term.trim()).ok_or_else(invalid)?;
        sum = if negative { sum.wrapping_sub(value) } else { sum.wrapping_add(value) };
        match tail.chars().next() {
            None => return Ok(sum),
            Some(operator) => negative = operator == '-',
        }
        rest = tail.get(1..).unwrap_or_default();
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16).ok(),
        Some(_) => None,
        None => text.parse().ok(),
    }
}

async fn examine(handle: &ControlHandle, text: &str, vcpu: Option<u32>) -> String {
    let (format, address) = match parse(text) {
        Ok(parsed) => parsed,
        Err(reason) => return format!("{reason}\r\n"),
    };
    let read = MemoryRead { address, len: format.count.saturating_mul(format.size), vcpu };
    match call(handle, ops::ReadMemory(read)).await {
        Ok(bytes) => show(format, address, &bytes),
        Err(_) => format!("Cannot access memory at address {address:#x}\r\n"),
    }
}

fn show(format: Format, address: u64, bytes: &[u8]) -> String {
    let per_line = match (format.letter, format.size) {
        ('c', _) => 8,
        (_, size) => 16 / size,
    };
    let line_bytes = per_line * format.size;
    let mut text = String::new();
    for (i, line) in bytes.chunks(line_bytes).enumerate() {
        let at = address.wrapping_add((i * line_bytes) as u64);
        // Writing to a String cannot fail.
        let _ = write!(text, "{at:016x}:");
        for item in line.chunks(format.size) {
            let mut raw = [0_u8; 8];
            raw.iter_mut().zip(item).for_each(|(to, from)| *to = *from);
            let value = u64::from_le_bytes(raw);
            let _ = match format.letter {
                'x' => write!(text, " 0x{value:0width$x}", width = format.size * 2),
                'o' => write!(text, " {value:#o}"),
                'u' => write!(text, " {value}"),
                'd' => {
                    let shift = 64 - 8 * format.size;
                    write!(text, " {}", (value << shift).cast_signed() >> shift)
                }
                _ => write!(text, " {:?}", char::from(raw[0])),
            };
        }
        text.push_str("\r\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_and_addresses() {
        let format = |count, letter, size| Format { count, letter, size };
        assert_eq!(parse(" 0x1000"), Ok((format(1, 'x', 4), 0x1000)));
        assert_eq!(parse("/4xg 0x80000000+0x10-1"), Ok((format(4, 'x', 8), 0x8000_000f)));
        assert_eq!(parse("/8c 16"), Ok((format(8, 'c', 1), 16)));
        for wrong in
            ["/4xz 0", "", "/1 nowhere", "/9999999999999999999 0", "/4i 0", "/99999999b 0", "/2x 0x+1"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn memory_looks_as_qemu_shows_it() {
        let (format, address) = parse("/5xw 0x1000").unwrap();
        let bytes: Vec<u8> = (0..20).collect();
        let expected = "0000000000001000: 0x03020100 0x07060504 0x0b0a0908 0x0f0e0d0c\r\n\
                        0000000000001010: 0x13121110\r\n";
        assert_eq!(show(format, address, &bytes), expected);
        let (format, address) = parse("/2db 0").unwrap();
        assert_eq!(show(format, address, &[0xff, 1]), "0000000000000000: -1 1\r\n");
    }
}
