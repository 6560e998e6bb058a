//! Compressed clusters.

use std::io;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

use super::header::Compression;

/// Deflate's window in compressed clusters: 2 to this. Other readers allocate no more.
const WINDOW_BITS: u8 = 12;

fn broken(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a compressed cluster cannot be decompressed: {text}"))
}

/// Fills `out` from a compressed cluster; `data` may go on behind its end.
///
/// # Errors
/// `InvalidData` if there is not exactly as much as a cluster.
pub(super) fn decompress(kind: Compression, data: &[u8], out: &mut [u8]) -> io::Result<()> {
    match kind {
        Compression::Zlib => {
            let mut stream = Decompress::new_with_window_bits(false, 15);
            while (stream.total_out() as usize) < out.len() {
                let (from, to) = (stream.total_in() as usize, stream.total_out() as usize);
                let status = stream
                    .decompress(
                        data.get(from..).unwrap_or_default(),
                        out.get_mut(to..).unwrap_or_default(),
                        FlushDecompress::Finish,
                    )
                    .map_err(|e| broken(&e.to_string()))?;
                let stuck = stream.total_in() as usize == from && stream.total_out() as usize == to;
                if (status == Status::StreamEnd && (stream.total_out() as usize) < out.len()) || stuck {
                    return Err(broken("it is too short"));
                }
            }
            Ok(())
        }
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(data)?.single_frame();
            io::Read::read_exact(&mut decoder, out).map_err(|e| broken(&e.to_string()))
        }
    }
}

/// Compresses a cluster; `None` if it does not get smaller.
///
/// # Errors
/// Those of the compressor.
pub(super) fn compress(kind: Compression, data: &[u8]) -> io::Result<Option<Vec<u8>>> {
    match kind {
        Compression::Zlib => {
            let mut out = vec![0; data.len()];
            let level = flate2::Compression::default();
            let mut stream = Compress::new_with_window_bits(level, false, WINDOW_BITS);
            let status = stream.compress(data, &mut out, FlushCompress::Finish).map_err(io::Error::other)?;
            out.truncate(stream.total_out() as usize);
            Ok((status == Status::StreamEnd && out.len() < data.len()).then_some(out))
        }
        Compression::Zstd => {
            let out = zstd::bulk::compress(data, 0)?;
            Ok((out.len() < data.len()).then_some(out))
        }
    }
}
