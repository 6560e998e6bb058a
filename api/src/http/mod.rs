//! The REST server: Cloud Hypervisor's API over HTTP/1.1 on a UNIX socket.
//!
//! Its clients are strict about the form: no reason phrase behind the status, header names in title
//! case, `Server: Cloud Hypervisor API`, errors as an array of strings.

mod handlers;
mod io;
pub mod openapi;
mod routes;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_vmm::control::ControlHandle;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::ext::ReasonPhrase;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

use io::{ReceivedFds, ScmStream};
use routes::{Answer, Call, Route};

/// Path under which all routes live.
pub const ROOT: &str = "/api/v1";
/// Largest body, as in Cloud Hypervisor.
const MAX_BODY: usize = 4 << 20;
/// Connections that are served at once.
const MAX_CONNECTIONS: usize = 64;
/// How long an answer may take to leave when the process ends.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A request that gets no good answer.
#[derive(Debug)]
pub(crate) struct HttpError {
    status: StatusCode,
    chain: Vec<String>,
}

impl HttpError {
    fn new(status: StatusCode, chain: Vec<String>) -> Self {
        Self { status, chain }
    }

    fn bad_request(reason: Option<String>) -> Self {
        let chain = std::iter::once("Bad Request".to_owned()).chain(reason).collect();
        Self::new(StatusCode::BAD_REQUEST, chain)
    }

    fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, vec!["Not Found".to_owned()])
    }
}

/// Serves `listener` until `shutdown` changes.
pub(crate) async fn serve(
    listener: UnixListener,
    handle: ControlHandle,
    mut shutdown: watch::Receiver<bool>,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = async {
                let slot = slots.clone().acquire_owned().await;
                listener.accept().await.map(|(stream, _)| (stream, slot))
            } => accepted,
            _ = connections.join_next(), if !connections.is_empty() => continue,
            _ = shutdown.changed() => break,
        };
        match accepted {
            Ok((stream, slot)) => {
                let (handle, shutdown) = (handle.clone(), shutdown.clone());
                connections.spawn(async move {
                    connection(stream, handle, shutdown).await;
                    drop(slot);
                });
            }
            Err(error) => {
                // Out of file descriptors, most likely: do not spin.
                tracing::warn!(%error, "the API socket cannot accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    let rest = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(LAST_WORDS * 2, rest).await;
}

async fn connection(stream: UnixStream, handle: ControlHandle, mut shutdown: watch::Receiver<bool>) {
    let (stream, fds) = ScmStream::new(stream);
    let service = service_fn(move |request| respond(request, handle.clone(), fds.clone()));
    let mut builder = http1::Builder::new();
    builder.title_case_headers(true).auto_date_header(false).half_close(true);
    let mut served = std::pin::pin!(builder.serve_connection(stream, service));
    let ended = tokio::select! {
        ended = served.as_mut() => Some(ended),
        _ = shutdown.changed() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            served.as_mut().graceful_shutdown();
            tokio::time::timeout(LAST_WORDS, served).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an API connection ended");
    }
}

async fn respond(
    request: Request<Incoming>,
    handle: ControlHandle,
    fds: ReceivedFds,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let close = request.headers().get(CONNECTION).is_some_and(|value| value.as_bytes() == b"close");
    let what = format!("{} {}", request.method(), request.uri().path());
    let answered = answer(request, handle, &fds).await;
    // File descriptors belong to the request that they came with, whether it took them or not.
    drop(fds.take());
    let (status, body) = match answered {
        Ok(Answer::NoContent) => (StatusCode::NO_CONTENT, None),
        Ok(Answer::Empty) => (StatusCode::OK, None),
        Ok(Answer::Json(body)) => (StatusCode::OK, Some(body)),
        Err(error) => {
            tracing::info!(request = what, status = error.status.as_u16(), "{}", error.chain.join(": "));
            let body = serde_json::to_string(&error.chain).unwrap_or_else(|_| "[]".to_owned());
            (error.status, Some(body))
        }
    };
    // What is left of a body that was too large is not read.
    Ok(response(status, body, close || status == StatusCode::PAYLOAD_TOO_LARGE))
}

fn response(status: StatusCode, body: Option<String>, close: bool) -> Response<Full<Bytes>> {
    let has_body = body.is_some();
    let mut response = Response::new(Full::new(Bytes::from(body.unwrap_or_default())));
    *response.status_mut() = status;
    // ch-remote reads everything between the version and the line's end as the status.
    response.extensions_mut().insert(ReasonPhrase::from_static(b""));
    let headers = response.headers_mut();
    headers.insert(SERVER, HeaderValue::from_static("Cloud Hypervisor API"));
    headers.insert(CONNECTION, HeaderValue::from_static(if close { "close" } else { "keep-alive" }));
    if has_body {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    response
}

async fn answer(
    request: Request<Incoming>,
    handle: ControlHandle,
    fds: &ReceivedFds,
) -> Result<Answer, HttpError> {
    let (head, body) = request.into_parts();
    // Whatever the answer will be: a connection with half a request in it could not be kept for the next one.
    let body = collect(body).await?;
    let route = head.uri.path().strip_prefix(ROOT).and_then(|path| path.strip_prefix('/'));
    let route = route.and_then(routes::find).ok_or_else(HttpError::not_found)?;
    let expected = if route.get { Method::GET } else { Method::PUT };
    if head.method != expected {
        let reason = format!("{} takes {expected}", route.name);
        return Err(HttpError::bad_request(Some(reason)));
    }
    check_body(route, &body)?;
    let fds = fds.take();
    if !fds.is_empty() && !route.takes_fds {
        let reason = format!("{} takes no file descriptors", route.name);
        return Err(HttpError::bad_request(Some(reason)));
    }
    (route.run)(Call { route, handle, body, fds }).await
}

async fn collect(body: Incoming) -> Result<Bytes, HttpError> {
    let collected = Limited::new(body, MAX_BODY).collect().await;
    collected.map(http_body_util::Collected::to_bytes).map_err(|error| {
        if error.is::<LengthLimitError>() {
            let reason = format!("the body is larger than {MAX_BODY} bytes");
            HttpError::new(StatusCode::PAYLOAD_TOO_LARGE, vec!["Payload Too Large".to_owned(), reason])
        } else {
            HttpError::bad_request(Some(error.to_string()))
        }
    })
}

fn check_body(route: &Route, body: &Bytes) -> Result<(), HttpError> {
    match (route.body.is_some(), body.is_empty()) {
        (true, true) => Err(HttpError::bad_request(Some(format!("{} needs a body", route.name)))),
        (false, false) => Err(HttpError::bad_request(Some(format!("{} takes no body", route.name)))),
        _ => Ok(()),
    }
}
