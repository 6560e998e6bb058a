//! Reads a table.

use crate::spec::{Encoding, Error, ErrorKind, Field, Operand, Source, Spec, Table};

/// Fields and words are at most this long, so that values fit an `i32` or a `u32`.
const MAX_FIELD: u32 = 32;
const MAX_WIDTH: u32 = 64;

/// Adds the table `text` to `spec`.
pub(crate) fn table(spec: &mut Spec, name: &str, text: &str) -> Result<(), Error> {
    let mut reader = Reader { spec, table: None, group: None, groups: 0 };
    let mut last = 1;
    for (number, line) in text.lines().enumerate() {
        last = number + 1;
        reader.line(strip_comment(line), last).map_err(|kind| Error {
            table: name.to_owned(),
            line: last,
            kind,
        })?;
    }
    reader.finish().map_err(|(line, kind)| Error { table: name.to_owned(), line: line.unwrap_or(last), kind })
}

/// A `#` starts a comment unless it follows `=`.
fn strip_comment(line: &str) -> &str {
    let bytes = line.as_bytes();
    let cut = (0..bytes.len())
        .find(|&i| bytes.get(i) == Some(&b'#') && (i == 0 || bytes.get(i - 1) != Some(&b'=')));
    cut.and_then(|at| line.get(..at)).unwrap_or(line)
}

struct Reader<'a> {
    spec: &'a mut Spec,
    table: Option<Table>,
    group: Option<usize>,
    groups: usize,
}

fn identifier(word: &str) -> Result<String, ErrorKind> {
    let mut chars = word.chars();
    let first = chars.next().is_some_and(|c| c.is_ascii_lowercase());
    if first && chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_') {
        Ok(word.to_owned())
    } else {
        Err(ErrorKind::Word(word.to_owned(), "a name of lower-case letters, digits and _"))
    }
}

fn number(word: &str) -> Result<u32, ErrorKind> {
    word.parse().map_err(|_| ErrorKind::Word(word.to_owned(), "a number"))
}

impl Reader<'_> {
    fn line(&mut self, line: &str, number: usize) -> Result<(), ErrorKind> {
        let mut words = line.split_whitespace();
        let Some(directive) = words.next() else { return Ok(()) };
        let words: Vec<&str> = words.collect();
        if directive == "decoder" {
            return self.decoder(&words);
        }
        if self.table.is_none() {
            return Err(ErrorKind::NoDecoder);
        }
        match directive {
            "field" => self.field(&words),
            "format" => self.format(&words),
            "insn" => {
                let (&name, rest) =
                    words.split_first().ok_or(ErrorKind::Syntax("insn NAME FORMAT PATTERN"))?;
                let (&format, rest) =
                    rest.split_first().ok_or(ErrorKind::Syntax("insn NAME FORMAT PATTERN"))?;
                self.insn(name, format, rest, number)
            }
            "reserved" => self.reserved(&words, number),
            "group" if words.is_empty() && self.group.is_none() => {
                self.group = Some(self.groups);
                self.groups += 1;
                Ok(())
            }
            "end" if words.is_empty() && self.group.is_some() => {
                self.group = None;
                Ok(())
            }
            "group" | "end" => Err(ErrorKind::Group),
            other => Err(ErrorKind::Directive(other.to_owned())),
        }
    }

    fn decoder(&mut self, words: &[&str]) -> Result<(), ErrorKind> {
        let &[name, width] = words else { return Err(ErrorKind::Syntax("decoder NAME WIDTH")) };
        let function = identifier(name)?;
        if self.table.is_some() || self.spec.tables.iter().any(|t| t.function == function) {
            return Err(ErrorKind::Twice(function));
        }
        let width = number(width)?;
        if !(1..=MAX_WIDTH).contains(&width) {
            return Err(ErrorKind::Range(width));
        }
        self.table = Some(Table { function, width, encodings: Vec::new() });
        Ok(())
    }

    fn width(&self) -> u32 {
        self.table.as_ref().map_or(0, |t| t.width)
    }

    fn field(&mut self, words: &[&str]) -> Result<(), ErrorKind> {
        let [name, bits, modifiers @ ..] = words else {
            return Err(ErrorKind::Syntax("field NAME BITS [signed] [<<N] [+N]"));
        };
        let name = identifier(name)?;
        let mut field = Field { segments: Vec::new(), signed: false, shift: 0, add: 0 };
        for segment in bits.split(',') {
            let (msb, lsb) = segment.split_once(':').unwrap_or((segment, segment));
            let (msb, lsb) = (number(msb)?, number(lsb)?);
            if msb >= self.width() {
                return Err(ErrorKind::Range(msb));
            }
            if lsb > msb {
                return Err(ErrorKind::Word(segment.to_owned(), "MSB:LSB"));
            }
            field.segments.push((msb, msb + 1 - lsb));
        }
        for &modifier in modifiers {
            if modifier == "signed" {
                field.signed = true;
            } else if let Some(n) = modifier.strip_prefix("<<") {
                field.shift = number(n)?;
            } else if let Some(n) = modifier.strip_prefix('+') {
                field.add = number(n)?;
            } else {
                return Err(ErrorKind::Word(modifier.to_owned(), "signed, <<N or +N"));
            }
        }
        if field.len().saturating_add(field.shift) > MAX_FIELD || field.add > 1 << 16 {
            return Err(ErrorKind::Word(name, "a field of at most 32 bits"));
        }
        if self.spec.fields.insert(name.clone(), field).is_some() {
            return Err(ErrorKind::Twice(name));
        }
        Ok(())
    }

    fn format(&mut self, words: &[&str]) -> Result<(), ErrorKind> {
        let (name, words) = words.split_first().ok_or(ErrorKind::Syntax("format NAME OPERAND..."))?;
        let name = identifier(name)?;
        let mut operands: Vec<Operand> = Vec::new();
        for word in words {
            let (operand, kind) = word.split_once(':').map_or((*word, None), |(o, k)| (o, Some(k)));
            let operand = identifier(operand)?;
            let default = self.spec.fields.get(&operand).cloned();
            let signed = match kind {
                None => default.as_ref().is_some_and(|f| f.signed),
                Some("signed") => true,
                Some("unsigned") => false,
                Some(other) => return Err(ErrorKind::Word(other.to_owned(), "signed or unsigned")),
            };
            if default.as_ref().is_some_and(|f| f.signed != signed) {
                return Err(ErrorKind::Signedness(operand));
            }
            if operands.iter().any(|o| o.name == operand) {
                return Err(ErrorKind::Twice(operand));
            }
            operands.push(Operand { name: operand, signed, default });
        }
        if self.spec.formats.insert(name.clone(), operands).is_some() {
            return Err(ErrorKind::Twice(name));
        }
        Ok(())
    }

    /// Mask and value of a pattern, and its operand bits.
    fn pattern(&self, words: &[&str]) -> Result<(u64, u64, u64), ErrorKind> {
        let width = self.width();
        let bits: Vec<char> = words.iter().flat_map(|w| w.chars()).collect();
        if bits.len() != width as usize {
            return Err(ErrorKind::Width(bits.len(), width));
        }
        let (mut mask, mut value, mut operand) = (0u64, 0u64, 0u64);
        for bit in bits {
            let (m, v, o) = match bit {
                '0' => (1, 0, 0),
                '1' => (1, 1, 0),
                '.' => (0, 0, 1),
                '-' => (0, 0, 0),
                other => return Err(ErrorKind::Word(other.to_string(), "0, 1, . or -")),
            };
            mask = mask << 1 | m;
            value = value << 1 | v;
            operand = operand << 1 | o;
        }
        Ok((mask, value, operand))
    }

    fn sources(&self, operands: &[Operand], given: &[&str]) -> Result<Vec<Source>, ErrorKind> {
        let mut sources: Vec<Option<Source>> =
            operands.iter().map(|o| o.default.clone().map(Source::Field)).collect();
        for word in given {
            let (name, from) =
                word.split_once('=').ok_or(ErrorKind::Syntax("OPERAND=FIELD or OPERAND=#CONSTANT"))?;
            let at = operands
                .iter()
                .position(|o| o.name == name)
                .ok_or_else(|| ErrorKind::Unknown(name.to_owned(), "operand"))?;
            let source = if let Some(constant) = from.strip_prefix('#') {
                let value: i32 =
                    constant.parse().map_err(|_| ErrorKind::Word(constant.to_owned(), "a number"))?;
                if value < 0 && operands.get(at).is_some_and(|o| !o.signed) {
                    return Err(ErrorKind::Signedness(name.to_owned()));
                }
                Source::Constant(i64::from(value))
            } else {
                let field =
                    self.spec.fields.get(from).ok_or_else(|| ErrorKind::Unknown(from.to_owned(), "field"))?;
                // An unsigned field may feed a signed operand if it surely stays positive.
                let fits =
                    |o: &Operand| o.signed == field.signed || o.signed && field.len() + field.shift < 31;
                if operands.get(at).is_some_and(|o| !fits(o)) {
                    return Err(ErrorKind::Signedness(name.to_owned()));
                }
                Source::Field(field.clone())
            };
            if let Some(slot) = sources.get_mut(at) {
                *slot = Some(source);
            }
        }
        sources
            .into_iter()
            .zip(operands)
            .map(|(s, o)| s.ok_or_else(|| ErrorKind::Unknown(o.name.clone(), "field of operand")))
            .collect()
    }

    fn insn(&mut self, name: &str, format: &str, rest: &[&str], line: usize) -> Result<(), ErrorKind> {
        let name = identifier(name)?;
        let operands =
            self.spec.formats.get(format).ok_or_else(|| ErrorKind::Unknown(format.to_owned(), "format"))?;
        let given = rest.iter().take_while(|w| w.contains('=')).count();
        let (given, pattern) = rest.split_at(given);
        let (mask, value, operand_bits) = self.pattern(pattern)?;
        let sources = self.sources(operands, given)?;
        let width = self.width();
        let mut read = 0;
        for source in &sources {
            if let Source::Field(field) = source {
                if let Some(&(msb, _)) = field.segments.iter().find(|s| s.0 >= width) {
                    return Err(ErrorKind::Range(msb));
                }
                read |= field.mask();
            }
        }
        if operand_bits & !read != 0 {
            return Err(ErrorKind::Unread((operand_bits & !read).trailing_zeros()));
        }
        match self.spec.insns.get(&name) {
            Some(other) if other != format => return Err(ErrorKind::Format(name, other.clone())),
            Some(_) => {}
            None => {
                self.spec.insns.insert(name.clone(), format.to_owned());
            }
        }
        let format = format.to_owned();
        self.push(Encoding { name: Some(name), format, mask, value, sources, line, group: self.group })
    }

    fn reserved(&mut self, pattern: &[&str], line: usize) -> Result<(), ErrorKind> {
        let (mask, value, _) = self.pattern(pattern)?;
        let format = String::new();
        self.push(Encoding { name: None, format, mask, value, sources: Vec::new(), line, group: self.group })
    }

    fn push(&mut self, new: Encoding) -> Result<(), ErrorKind> {
        let table = self.table.as_mut().ok_or(ErrorKind::NoDecoder)?;
        for old in &table.encodings {
            let same_group = new.group.is_some() && old.group == new.group;
            let names = || (new.label().to_owned(), old.label().to_owned(), old.line);
            if same_group && old.covers(&new) {
                let (a, b, line) = names();
                return Err(ErrorKind::Hidden(a, b, line));
            }
            if !same_group && old.overlaps(&new) {
                let (a, b, line) = names();
                return Err(ErrorKind::Overlap(a, b, line));
            }
        }
        table.encodings.push(new);
        Ok(())
    }

    fn finish(self) -> Result<(), (Option<usize>, ErrorKind)> {
        if self.group.is_some() {
            return Err((None, ErrorKind::Group));
        }
        self.spec.tables.push(self.table.ok_or((Some(1), ErrorKind::NoDecoder))?);
        Ok(())
    }
}
