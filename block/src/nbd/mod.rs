//! Network block devices: client and server of the NBD protocol ("The NBD protocol", newstyle negotiation).

mod client;
mod handshake;
mod list;
pub mod proto;
mod server;
mod stream;
#[cfg(test)]
mod tests;
mod transmission;
mod uri;
mod writer;

pub use client::{ClientOptions, ExportInfo, Nbd};
pub use list::list;
pub use server::{BitmapContext, Export, Guard, HANDSHAKE, Server};
pub use stream::{Address, Listener, Socket, Stream, TlsClient};
pub use uri::parse as parse_uri;
pub use writer::{Writer, WriterError};
