//! PCI: root bus, configuration space, BARs, INTx and MSI-X.

/// A PCI root bus.
#[derive(Debug)]
pub struct PciBus {}
