//! Packet back ends: knows no VM.
