//! The text of `info jit`.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::shared::VcpuShared;
use crate::vm::TcgVm;

fn sum(vcpus: &[std::sync::Arc<VcpuShared>], field: impl Fn(&VcpuShared) -> &AtomicU64) -> u64 {
    vcpus.iter().map(|v| field(v).load(Ordering::Relaxed)).sum()
}

fn ratio(a: u64, b: u64) -> f64 {
    if b == 0 { 0.0 } else { a as f64 / b as f64 }
}

impl TcgVm {
    /// What was translated, what it cost, and how well it is linked.
    pub fn info(&self) -> String {
        let vcpus = self.vcpus();
        let regions = self.regions.counts();
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let c = &self.counts;
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{name:<28}{value}");
        };
        line("guest", self.guest.spec().name.to_owned());
        line("engine", self.engine.name().to_owned());
        if let Some(cache) = self.cache() {
            let (used, evictions) = cache.counters();
            let sizes = (cache.len() >> 10, cache.segment_len() >> 10);
            line("code cache", format!("{} KiB in segments of {} KiB", sizes.0, sizes.1));
            line("code generated", format!("{used} bytes"));
            line("segments evicted", evictions.to_string());
        }
        let (guest_bytes, host_bytes) = (get(&c.guest_bytes), get(&c.host_bytes));
        let (translated, timed) = (get(&c.translated), get(&c.timed));
        let each = ratio(get(&c.timed_ns), timed) / 1e3;
        let (blocks, insns) = (get(&c.blocks), get(&c.insns));
        line("regions translated", translated.to_string());
        line("regions translated ahead", get(&c.ahead).to_string());
        line("regions translated unshared", get(&c.unshared).to_string());
        line("basic blocks translated", blocks.to_string());
        line("instructions translated", insns.to_string());
        line("guest bytes translated", guest_bytes.to_string());
        line("host bytes generated", host_bytes.to_string());
        line("expansion", format!("{:.1}", ratio(host_bytes, guest_bytes)));
        line("translation per region", format!("{each:.2} us of CPU time (mean of {timed} regions)"));
        let in_all = each * translated as f64;
        line("translation per basic block", format!("{:.2} us of CPU time", in_all / blocks.max(1) as f64));
        line("translation per instruction", format!("{:.2} us of CPU time", in_all / insns.max(1) as f64));
        line("translation in all", format!("{:.0} ms of CPU time", in_all / 1e3));
        line("regions live", format!("{} on {} pages", regions.live, regions.pages));
        line("region average guest size", format!("{:.1} bytes", ratio(regions.guest_bytes, regions.live)));
        line("region average insns", format!("{:.1}", ratio(regions.insns, regions.live)));
        line("region average host size", format!("{:.1} bytes", ratio(regions.host_bytes, regions.live)));
        let chained = 100.0 * ratio(regions.linked, regions.links);
        line("direct jumps chained", format!("{chained:.0}% ({} of {})", regions.linked, regions.links));
        line("regions invalidated", get(&c.invalidated).to_string());
        line("regions evicted", get(&c.evicted).to_string());
        line("regions stale when made", get(&c.stale).to_string());
        line("pages protected", get(&c.protections).to_string());
        line("waits for writers", get(&c.waits).to_string());
        line("stores to code pages", sum(&vcpus, |v| &v.counts.code_stores).to_string());
        let misses = sum(&vcpus, |v| &v.counts.tlb.fills) + sum(&vcpus, |v| &v.counts.tlb.victims);
        line("TLB misses", misses.to_string());
        line("TLB fills", sum(&vcpus, |v| &v.counts.tlb.fills).to_string());
        line("TLB victim hits", sum(&vcpus, |v| &v.counts.tlb.victims).to_string());
        line("TLB full flushes", sum(&vcpus, |v| &v.counts.tlb.flushes).to_string());
        line("TLB flushes of a space", sum(&vcpus, |v| &v.counts.tlb.space_flushes).to_string());
        line("TLB flushes, large page", sum(&vcpus, |v| &v.counts.tlb.large_flushes).to_string());
        line("TLB page flushes", sum(&vcpus, |v| &v.counts.tlb.page_flushes).to_string());
        line("branch cache flushes", sum(&vcpus, |v| &v.counts.tlb.branch_flushes).to_string());
        line("TLB generation wraps", sum(&vcpus, |v| &v.counts.tlb.wraps).to_string());
        line("entries", sum(&vcpus, |v| &v.counts.entries).to_string());
        line("indirect lookups", sum(&vcpus, |v| &v.counts.lookups).to_string());
        line("links made", sum(&vcpus, |v| &v.counts.links).to_string());
        line("bus accesses", sum(&vcpus, |v| &v.counts.mmio).to_string());
        line("exceptions", sum(&vcpus, |v| &v.counts.faults).to_string());
        line("interrupts", sum(&vcpus, |v| &v.counts.interrupts).to_string());
        line("sleeps", sum(&vcpus, |v| &v.counts.sleeps).to_string());
        text
    }
}
