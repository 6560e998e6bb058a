//! Writes the decoder.

use std::fmt::Write;

use crate::spec::{Encoding, Field, Operand, Source, Spec, Table};
use crate::tree::{self, Node};

/// `fcvt_s_d` to `FcvtSD`.
fn camel(name: &str) -> String {
    let mut out = String::new();
    for part in name.split('_') {
        let mut chars = part.chars();
        if let Some(first) = chars.next() {
            // Digits need a separator to stay apart from digits before them.
            if first.is_ascii_digit() && out.ends_with(|c: char| c.is_ascii_digit()) {
                out.push('_');
            }
            out.push(first.to_ascii_uppercase());
            out.push_str(chars.as_str());
        }
    }
    out
}

fn word_type(width: u32) -> &'static str {
    match width {
        0..=16 => "u16",
        17..=32 => "u32",
        _ => "u64",
    }
}

/// All of the source. Writing to a `String` cannot fail.
pub(crate) fn rust(spec: &Spec) -> String {
    let mut out = String::from("// Generated from instruction tables.\n\n");
    for (name, operands) in &spec.formats {
        let _ = writeln!(out, "/// Operands of format `{name}`.");
        out.push_str("#[derive(Debug, Clone, Copy, PartialEq, Eq)]\n");
        let _ = writeln!(out, "pub struct {} {{", camel(name));
        for Operand { name, signed, .. } in operands {
            let ty = if *signed { "i32" } else { "u32" };
            let _ = writeln!(out, "    /// `{name}`.\n    pub {name}: {ty},");
        }
        out.push_str("}\n\n");
    }
    out.push_str(
        "/// A decoded instruction.\n#[derive(Debug, Clone, Copy, PartialEq, Eq)]\npub enum Insn {\n",
    );
    for (name, format) in &spec.insns {
        let _ = writeln!(out, "    /// `{name}`.\n    {}({}),", camel(name), camel(format));
    }
    out.push_str("}\n\nimpl Insn {\n    /// The instruction's name in the table.\n    #[allow(clippy::too_many_lines)]\n");
    out.push_str("    pub fn name(&self) -> &'static str {\n        match self {\n");
    for name in spec.insns.keys() {
        let _ = writeln!(out, "            Self::{}(_) => \"{name}\",", camel(name));
    }
    out.push_str("        }\n    }\n}\n");
    for table in &spec.tables {
        function(&mut out, spec, table);
    }
    out
}

fn function(out: &mut String, spec: &Spec, table: &Table) {
    let ty = word_type(table.width);
    let name = &table.function;
    let _ = writeln!(out, "\n/// Decodes a word of {} bits; `None` if it is no instruction.", table.width);
    out.push_str("#[allow(clippy::all, clippy::pedantic, unused_parens)]\n");
    let _ = writeln!(out, "pub fn {name}(w: {ty}) -> Option<Insn> {{");
    node(out, &Context { spec, table, ty }, &tree::build(&table.encodings), 1);
    out.push_str("}\n");
}

struct Context<'a> {
    spec: &'a Spec,
    table: &'a Table,
    ty: &'static str,
}

fn node(out: &mut String, cx: &Context<'_>, at: &Node, depth: usize) {
    let pad = "    ".repeat(depth);
    match at {
        Node::Nothing => {
            let _ = writeln!(out, "{pad}None");
        }
        Node::Test { mask, value, encoding, other } => {
            let Some(found) = cx.table.encodings.get(*encoding) else { return };
            let text = result(cx, found);
            if *mask == 0 {
                let _ = writeln!(out, "{pad}{text}");
                return;
            }
            let _ = writeln!(out, "{pad}if w & {mask:#x} == {value:#x} {{\n{pad}    {text}\n{pad}}} else {{");
            node(out, cx, other, depth + 1);
            let _ = writeln!(out, "{pad}}}");
        }
        Node::Switch { shift, bits, arms } => {
            let _ = writeln!(out, "{pad}match (w >> {shift}) & {:#x} {{", (1u64 << bits) - 1);
            for (value, arm) in arms {
                let _ = writeln!(out, "{pad}    {value:#x} => {{");
                node(out, cx, arm, depth + 2);
                let _ = writeln!(out, "{pad}    }}");
            }
            let _ = writeln!(out, "{pad}    _ => None,\n{pad}}}");
        }
    }
}

fn result(cx: &Context<'_>, found: &Encoding) -> String {
    let Some(name) = &found.name else { return "None".to_owned() };
    let mut text = format!("Some(Insn::{}({} {{ ", camel(name), camel(&found.format));
    let operands = cx.spec.formats.get(&found.format).map_or(&[][..], Vec::as_slice);
    for (operand, source) in operands.iter().zip(&found.sources) {
        let value = match source {
            Source::Constant(c) => c.to_string(),
            Source::Field(f) if operand.signed && !f.signed => format!("{} as i32", extract(f, cx.ty)),
            Source::Field(f) => extract(f, cx.ty),
        };
        let _ = write!(text, "{}: {value}, ", operand.name);
    }
    text.push_str("}))");
    text
}

fn extract(field: &Field, ty: &str) -> String {
    let mut left = field.len();
    let mut parts = Vec::new();
    for &(msb, len) in &field.segments {
        left -= len;
        let lsb = msb + 1 - len;
        let mask = (1u64 << len) - 1;
        let bits = if ty == "u64" {
            format!("(((w >> {lsb}) & {mask:#x}) as u32)")
        } else {
            format!("((u32::from(w) >> {lsb}) & {mask:#x})")
        };
        parts.push(if left == 0 { bits } else { format!("{bits} << {left}") });
    }
    let mut text = format!("({})", parts.join(" | "));
    if field.signed {
        let unused = 32 - field.len();
        text = format!("(({text} << {unused}) as i32 >> {unused})");
    }
    if field.shift != 0 {
        text = format!("({text} << {})", field.shift);
    }
    if field.add != 0 {
        text = format!("({text} + {})", field.add);
    }
    text
}
