//! A VM: its machine, devices and vCPUs.

pub mod vcpus;
