//! Many cases on two processors, and a report.

use std::collections::BTreeMap;
use std::fmt::Write;

use iced_x86::{Code, FlowControl};

use super::case::{CODE_SIZE, Case, DATA_SIZE, End, Outcome, Processor, patterns};
use super::compare::{Mismatch, compare, decode, listing, minimise};
use super::generate::Generator;
use super::random::Random;
use super::templates::never_ends;

/// Cases of a code before it counts as one that never ends.
const ATTEMPTS: usize = 2000;
/// States that each code is run from.
const STATES: usize = 6;

/// How far to go.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Instructions.
    pub insns: u64,
    /// Kinds of mismatches after which it ends.
    pub kinds: usize,
}

/// What a campaign found.
pub struct Report {
    /// Instructions that both ran.
    pub insns: u64,
    /// Mismatches by kind: the first, minimised, and how many more.
    pub kinds: BTreeMap<String, (String, u64)>,
    /// Codes that never went past their end without an exception, though nothing says why.
    pub never: Vec<String>,
    /// Codes that did, though [`never_ends`] says that they cannot.
    pub wrong: Vec<String>,
    /// Codes that raise an exception whatever the state, as [`never_ends`] says.
    pub refused: usize,
    /// Codes there are.
    pub codes: usize,
}

impl Report {
    /// Text for a failed test.
    pub fn mismatches(&self) -> String {
        let mut text = String::new();
        for (kind, (first, count)) in &self.kinds {
            let _ = writeln!(text, "{kind} ({count})\n  {first}");
        }
        text
    }
}

/// Runs random cases on both.
pub fn run(seed: u64, limits: Limits, a: &mut dyn Processor, b: &mut dyn Processor) -> Report {
    run_of(Generator::new(seed), seed, limits, (a, b))
}

/// Runs what `generator` makes on both.
pub fn run_of(
    mut generator: Generator,
    seed: u64,
    limits: Limits,
    (a, b): (&mut dyn Processor, &mut dyn Processor),
) -> Report {
    let patterns = patterns();
    let mut gaps = Random::new(seed ^ 0x6a95);
    let mut report = Report {
        insns: 0,
        kinds: BTreeMap::new(),
        never: Vec::new(),
        wrong: Vec::new(),
        refused: 0,
        codes: 0,
    };
    while report.insns < limits.insns && report.kinds.len() < limits.kinds {
        let mut area = vec![0x90u8; CODE_SIZE];
        let mut cases = Vec::new();
        let mut at = 0;
        while at + 160 < CODE_SIZE {
            let case = generator.case(at);
            let bytes = case.bytes();
            area[at..at + bytes.len()].copy_from_slice(&bytes);
            at += bytes.len() + gaps.below(12) as usize;
            cases.push(case);
        }
        a.place(0, &area);
        b.place(0, &area);
        let mut bad = Vec::new();
        for case in &cases {
            bad.extend(states(case, &patterns, a, b, (&mut generator, &mut report.insns)));
        }
        for (case, first) in bad {
            note((&case, first), &patterns[case.pattern()], a, b, &mut report);
        }
    }
    for bits in [64, 32] {
        for code in generator.codes(bits).to_vec() {
            if report.kinds.len() < limits.kinds {
                chase((bits, code), &patterns, (a, b), &mut generator, &mut report);
            }
        }
    }
    coverage(&generator, &mut report);
    report
}

/// Runs a code alone until some state has taken it to its end.
fn chase(
    (bits, code): (u32, Code),
    patterns: &[[u8; DATA_SIZE]],
    (a, b): (&mut dyn Processor, &mut dyn Processor),
    generator: &mut Generator,
    report: &mut Report,
) {
    for attempt in 0..ATTEMPTS {
        let seen = generator.seen.get(&(bits, code)).copied().unwrap_or_default();
        // Those that cannot are tried a few times.
        if seen.retired > 0 || never_ends(code).is_some() && seen.faulted >= STATES as u64 {
            return;
        }
        let case = generator.case_of(bits, code, 0x40 * (attempt % 0x40));
        let bytes = case.bytes();
        a.place(case.at, &bytes);
        b.place(case.at, &bytes);
        if let Some((case, first)) = states(&case, patterns, a, b, (generator, &mut report.insns)) {
            note((&case, first), &patterns[case.pattern()], a, b, report);
            return;
        }
    }
}

/// Runs a case from several states; the one that differs.
fn states(
    case: &Case,
    patterns: &[[u8; DATA_SIZE]],
    a: &mut dyn Processor,
    b: &mut dyn Processor,
    (generator, insns): (&mut Generator, &mut u64),
) -> Option<(Case, Mismatch)> {
    let mut seeds = Random::new(case.seed);
    for _ in 0..STATES {
        let case = Case { seed: seeds.next(), ..case.clone() };
        let (outcome, mismatch) = compare(&case, a, b, &patterns[case.pattern()]);
        *insns += count(&case, &outcome, generator);
        if let Some(mismatch) = mismatch {
            return Some((case, mismatch));
        }
    }
    None
}

/// Counts what was run.
fn count(case: &Case, outcome: &Outcome, generator: &mut Generator) -> u64 {
    let mut ran = 0;
    for insn in decode(case) {
        let seen = generator.seen.entry((case.bits, insn.code())).or_default();
        if outcome.end != End::Done && insn.ip() == outcome.image.rip {
            seen.faulted += 1;
            return ran + 1;
        }
        ran += 1;
        seen.retired += 1;
        if insn.flow_control() != FlowControl::Next {
            break;
        }
    }
    ran
}

fn note(
    (case, first): (&Case, Mismatch),
    data: &[u8; DATA_SIZE],
    a: &mut dyn Processor,
    b: &mut dyn Processor,
    report: &mut Report,
) {
    let (small, mismatch) = minimise((case, first), a, b, data);
    let text = format!("{small}\n  {}\n    {}", listing(&small), mismatch.text);
    let entry = report.kinds.entry(mismatch.kind).or_insert((text, 0));
    entry.1 += 1;
}

fn coverage(generator: &Generator, report: &mut Report) {
    for bits in [64, 32] {
        for code in generator.codes(bits) {
            report.codes += 1;
            let seen = generator.seen.get(&(bits, *code)).copied().unwrap_or_default();
            match (seen.retired > 0, never_ends(*code)) {
                (true, Some(why)) => report.wrong.push(format!("{bits} {code:?}: {why}")),
                (false, Some(_)) => report.refused += 1,
                (false, None) => report.never.push(format!("{bits} {code:?} ({} faults)", seen.faulted)),
                (true, None) => {}
            }
        }
    }
}
