//! What a server has.

use std::io;

use super::client::{ClientOptions, ExportInfo, Talk, refusal};
use super::proto::{option, string_from};
use super::{Address, TlsClient};

/// The exports of a server.
///
/// # Errors
/// The connection's, TLS's, or the server's refusal.
pub fn list(address: &Address, tls: Option<TlsClient>) -> io::Result<Vec<ExportInfo>> {
    let options = ClientOptions {
        address: address.clone(),
        export: String::new(),
        tls,
        context: None,
        reconnect_delay: 0,
        open_timeout: 0,
        readonly: true,
    };
    let mut talk = Talk::start(&options)?;
    let structured = talk.structured()?;
    let (good, replies) = talk.replies(option::LIST, &[])?;
    if let (false, Some((kind, data))) = (good, replies.last()) {
        return Err(refusal((*kind, String::from_utf8_lossy(data).into_owned()), ""));
    }
    let mut out = Vec::new();
    for (_, data) in replies {
        let mut b = data.as_slice();
        let name = string_from(&mut b)?;
        let description = Some(String::from_utf8_lossy(b).into_owned()).filter(|d| !d.is_empty());
        let mut export = match talk.info(option::INFO, &name)? {
            Ok(found) => found,
            Err(_) => ExportInfo { name: name.clone(), ..ExportInfo::default() },
        };
        export.description = export.description.or(description);
        if structured {
            let contexts = talk.contexts(option::LIST_META_CONTEXT, &name, &[])?;
            export.contexts = contexts.into_iter().map(|(_, c)| c).collect();
        }
        out.push(export);
    }
    talk.ask(option::ABORT, &[])?;
    Ok(out)
}
