-- Note offsets as done, if the caller's lock still holds.
-- KEYS: lock (string), audit (stream), then the bitmap of each offset; ARGV: token of the lock, audit entry (JSON) or "",
-- entries of the audit that are kept, then the bit of each offset
-- Returns 1; 0 if the lock is another's, or nobody's.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for i = 3, #KEYS do redis.call('SETBIT', KEYS[i], ARGV[i + 1], 1) end
if ARGV[2] ~= '' then redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', 'entry', ARGV[2]) end
return 1
