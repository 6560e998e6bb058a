//! CPUID tables: what a guest sees is what its model asks for, as far as the accelerator supports it.
//! Leaves are those of SDM volume 2, CPUID, and APM volume 3, appendix E.

use super::{CpuTopology, CpuidEntry, shl};

/// EAX of a register array.
const EAX: usize = 0;
/// EBX.
const EBX: usize = 1;
/// ECX.
const ECX: usize = 2;
/// EDX.
const EDX: usize = 3;

/// Leaf 1 ECX: x2APIC.
pub const X2APIC: u32 = 1 << 21;
/// Leaf 1 ECX: TSC deadline timer.
pub const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: OSXSAVE, which mirrors CR4 and is no feature.
pub const OSXSAVE: u32 = 1 << 27;
/// Leaf 1 ECX: there is a hypervisor.
pub const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;

/// The registers of a leaf that hold feature flags: only these are intersected; the others are numbers
/// or strings, taken from the model.
fn feature_registers(function: u32, index: u32) -> &'static [usize] {
    match (function, index) {
        (1, _) => &[ECX, EDX],
        (7, 0) => &[EBX, ECX, EDX],
        (7, _) => &[EAX, EBX, ECX, EDX],
        (0xd, 0) => &[EAX, EDX],
        (0xd, 1) => &[EAX, ECX, EDX],
        (0x14 | 0x1d | 0x1e, _) => &[EAX, EBX, ECX, EDX],
        (0x4000_0001, _) => &[EAX],
        (0x8000_0001, _) => &[ECX, EDX],
        (0x8000_0007, _) => &[EDX],
        (0x8000_0008, _) => &[EBX],
        (0x8000_000a, _) => &[EDX],
        (0x8000_0021, _) => &[EAX],
        _ => &[],
    }
}

/// The entry of a leaf.
pub(super) fn find(table: &[CpuidEntry], function: u32, index: u32) -> Option<&CpuidEntry> {
    table.iter().find(|e| e.function == function && (!e.indexed || e.index == index))
}

/// `model` as far as `supported` has it. An empty model is everything that is supported. A leaf that is
/// all feature flags and is not supported at all becomes zero.
pub fn intersect(supported: &[CpuidEntry], model: &[CpuidEntry]) -> Vec<CpuidEntry> {
    if model.is_empty() {
        return supported.to_vec();
    }
    let mut out = Vec::with_capacity(model.len());
    for entry in model {
        let mut entry = *entry;
        let have = find(supported, entry.function, entry.index).map_or([0; 4], |e| e.regs);
        for &r in feature_registers(entry.function, entry.index) {
            entry.regs[r] &= have[r];
        }
        // The sizes of the XSAVE area and its components are the processor's, whatever the model says.
        if entry.function == 0xd {
            match entry.index {
                0 => (entry.regs[EBX], entry.regs[ECX]) = (have[EBX], have[ECX]),
                1 => entry.regs[EBX] = have[EBX],
                _ => entry.regs = have,
            }
        }
        out.push(entry);
    }
    // The paravirtual leaves describe the accelerator, not the model.
    if !model.iter().any(|e| (0x4000_0000..0x4001_0000).contains(&e.function)) {
        out.extend(supported.iter().filter(|e| (0x4000_0000..0x4001_0000).contains(&e.function)));
    }
    out
}

/// Features that `model` names and `supported` lacks: (leaf, index, register 0 to 3, bits).
pub fn missing(supported: &[CpuidEntry], model: &[CpuidEntry]) -> Vec<(u32, u32, usize, u32)> {
    let mut out = Vec::new();
    for entry in model {
        let have = find(supported, entry.function, entry.index).map_or([0; 4], |e| e.regs);
        for &r in feature_registers(entry.function, entry.index) {
            let lacking = entry.regs[r] & !have[r];
            if lacking != 0 {
                out.push((entry.function, entry.index, r, lacking));
            }
        }
    }
    out
}

/// A guest whose XSAVE areas are laid out otherwise than here: what it has in memory would be loaded wrongly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest has component {component} of XSAVE areas at byte {theirs}, processors here have it at {ours}"
)]
pub struct LayoutError {
    component: u32,
    theirs: u32,
    ours: u32,
}

/// Whether areas of XSAVE in the standard format have the components of `xcr0` where a guest with the table `theirs` has
/// them (AMD's processors leave out MPX, for one; SDM volume 1, section 13.4.3).
///
/// # Errors
/// [`LayoutError`].
pub fn same_xsave_layout(theirs: &[CpuidEntry], ours: &[CpuidEntry], xcr0: u64) -> Result<(), LayoutError> {
    let at = |table: &[CpuidEntry], n: u32| find(table, 0xd, n).map(|e| e.regs[EBX]).filter(|at| *at != 0);
    for component in (2..63).filter(|n| xcr0 >> n & 1 != 0) {
        if let (Some(theirs), Some(ours)) = (at(theirs, component), at(ours, component))
            && theirs != ours
        {
            return Err(LayoutError { component, theirs, ours });
        }
    }
    Ok(())
}

/// Writes into `table` what differs from vCPU to vCPU: APIC ids and the topology leaves (1, 4, 0xb, 0x1f,
/// 0x80000008, 0x8000001e), for the vCPU with `apic_id`.
pub fn place(table: &mut Vec<CpuidEntry>, topology: CpuTopology, apic_id: u32) {
    let per_package = topology.per_package();
    let max_leaf = find(table, 0, 0).map_or(0, |e| e.regs[EAX]);
    for e in table.iter_mut() {
        match e.function {
            1 => {
                e.regs[EBX] = e.regs[EBX] & 0x0000_ffff | (apic_id & 0xff) << 24 | per_package.min(255) << 16;
                e.regs[ECX] = (e.regs[ECX] | HYPERVISOR) & !OSXSAVE;
                e.regs[EDX] = if per_package > 1 { e.regs[EDX] | HTT } else { e.regs[EDX] & !HTT };
            }
            // Cache sharing: levels 1 and 2 within a core, level 3 within a package.
            4 if e.regs[EAX] & 0x1f != 0 => {
                let level = e.regs[EAX] >> 5 & 7;
                let shift = if level < 3 { topology.core_shift() } else { topology.package_shift() };
                let sharing = shl(1, shift);
                let cores = shl(1, topology.package_shift() - topology.core_shift());
                e.regs[EAX] =
                    e.regs[EAX] & 0x3fff | (sharing - 1).min(0xfff) << 14 | (cores - 1).min(0x3f) << 26;
            }
            0x8000_0008 => {
                let size = topology.package_shift();
                e.regs[ECX] = e.regs[ECX] & !0xf0ff | (per_package - 1).min(0xff) | size.min(0xf) << 12;
            }
            0x8000_001e => {
                e.regs[EAX] = apic_id;
                e.regs[EBX] = apic_id.checked_shr(topology.core_shift()).unwrap_or(0) & 0xff
                    | (topology.threads.max(1) - 1).min(0xff) << 8;
                e.regs[ECX] = apic_id.checked_shr(topology.die_shift()).unwrap_or(0) & 0xff
                    | (topology.dies.max(1) - 1).min(7) << 8;
            }
            _ => {}
        }
    }
    table.retain(|e| e.function != 0xb && e.function != 0x1f);
    if max_leaf >= 0xb {
        extended_topology(table, 0xb, topology, apic_id);
    }
    if max_leaf >= 0x1f {
        extended_topology(table, 0x1f, topology, apic_id);
    }
}

/// Leaves 0xb (threads and cores) and 0x1f (dies too): one subleaf a level, ended by an invalid one.
fn extended_topology(table: &mut Vec<CpuidEntry>, function: u32, topology: CpuTopology, apic_id: u32) {
    let mut levels = vec![(1, topology.core_shift(), topology.threads.max(1))];
    if function == 0x1f && topology.dies > 1 {
        let per_die = topology.threads.max(1).saturating_mul(topology.cores.max(1));
        levels.push((2, topology.die_shift(), per_die));
        levels.push((5, topology.package_shift(), topology.per_package()));
    } else {
        levels.push((2, topology.package_shift(), topology.per_package()));
    }
    levels.push((0, 0, 0));
    for (index, (kind, shift, count)) in (0u32..).zip(levels) {
        let regs = [shift, count & 0xffff, kind << 8 | index, apic_id];
        table.push(CpuidEntry { function, index, indexed: true, regs });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_stays_where_its_xsave_areas_are_laid_out_as_it_has_them() {
        let table = |pkru: u32| {
            let leaf = |n, at| CpuidEntry { function: 0xd, index: n, indexed: true, regs: [8, at, 0, 0] };
            vec![leaf(2, 576), leaf(9, pkru)]
        };
        assert_eq!(same_xsave_layout(&table(2688), &table(2688), 0x207), Ok(()));
        assert_eq!(same_xsave_layout(&table(832), &table(2688), 7), Ok(()), "it has no PKRU");
        assert_eq!(same_xsave_layout(&[], &table(2688), 0x207), Ok(()), "nobody says");
        let error = same_xsave_layout(&table(832), &table(2688), 0x207).expect_err("they differ").to_string();
        assert!(error.contains("component 9") && error.contains("byte 832"), "{error}");
    }

    fn entry(function: u32, index: u32, regs: [u32; 4]) -> CpuidEntry {
        CpuidEntry { function, index, indexed: matches!(function, 4 | 7 | 0xb | 0xd | 0x1f), regs }
    }

    #[test]
    fn only_supported_features_of_the_model_remain() {
        let supported = [entry(0, 0, [0x1f, 1, 2, 3]), entry(7, 0, [0, 0b1100, 1, 0])];
        let model = [entry(0, 0, [0xd, 7, 8, 9]), entry(7, 0, [0, 0b0110, 8, 4]), entry(1, 0, [5, 6, 7, 8])];
        let table = intersect(&supported, &model);
        assert_eq!(table[0].regs, [0xd, 7, 8, 9], "names and limits are the model's");
        assert_eq!(table[1].regs, [0, 0b0100, 0, 0]);
        assert_eq!(table[2].regs, [5, 6, 0, 0], "an unsupported leaf has no features");
        assert_eq!(
            missing(&supported, &model),
            [(7, 0, 1, 2), (7, 0, 2, 8), (7, 0, 3, 4), (1, 0, 2, 7), (1, 0, 3, 8)]
        );
        assert_eq!(intersect(&supported, &[]), supported);
    }

    #[test]
    fn apic_ids_have_gaps_where_counts_are_no_powers_of_two() {
        let t = CpuTopology { threads: 2, cores: 3, dies: 1 };
        let ids: Vec<u32> = (0..8).map(|i| t.apic_id(i)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9]);
        assert_eq!((0..5).map(|i| CpuTopology::flat(5).apic_id(i)).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert_eq!(CpuTopology { threads: 1, cores: 1, dies: 1 }.package_shift(), 0);
    }

    #[test]
    fn an_absurd_topology_is_survived() {
        let t = CpuTopology { threads: u32::MAX, cores: u32::MAX, dies: u32::MAX };
        let mut table: Vec<CpuidEntry> =
            [0, 1, 4, 0x1f, 0x8000_0008, 0x8000_001e].map(|f| entry(f, 0, [0x3f, 1, 1, 1])).to_vec();
        for index in [0, 1, u32::MAX] {
            place(&mut table, t, t.apic_id(index));
        }
        assert_eq!(t.per_package(), u32::MAX);
    }

    #[test]
    fn topology_leaves_tell_where_a_vcpu_is() {
        let t = CpuTopology { threads: 2, cores: 2, dies: 1 };
        let mut table = vec![entry(0, 0, [0xb, 0, 0, 0]), entry(1, 0, [0, 0xaabb_ccdd, OSXSAVE, 0])];
        place(&mut table, t, t.apic_id(5));
        assert_eq!(table[1].regs, [0, 0x0504_ccdd, HYPERVISOR, HTT]);
        let b: Vec<[u32; 4]> = table.iter().filter(|e| e.function == 0xb).map(|e| e.regs).collect();
        assert_eq!(b, [[1, 2, 0x100, 5], [2, 4, 0x201, 5], [0, 0, 2, 5]]);
    }
}
