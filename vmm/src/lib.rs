//! The VM: machines, lifecycle, snapshot.
