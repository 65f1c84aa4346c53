/** The one shape of every error that the Worker answers, which is the service's own. */
import type { ErrorDetail, ErrorResponse } from "./schema.js";

/** What the caller is told. */
export class Fault extends Error {
  constructor(
    readonly status: 400 | 401 | 404 | 409 | 413 | 415 | 422 | 500 | 502,
    readonly code: string,
    message: string,
    readonly details?: ErrorDetail["details"],
    options?: ErrorOptions,
  ) {
    super(message, options);
  }
}

/** The fault of one field. */
export function invalid(field: string, message: string): Fault {
  return new Fault(422, "VALIDATION_FAILED", "1 field is invalid; see details.", [{ field, message }]);
}

export function envelope(fault: Fault, requestId: string): ErrorResponse {
  const { code, message, details } = fault;
  return {
    success: false,
    data: null,
    error: { code, message, ...(details === undefined ? {} : { details }) },
    meta: { request_id: requestId, timestamp: new Date().toISOString() },
  };
}
