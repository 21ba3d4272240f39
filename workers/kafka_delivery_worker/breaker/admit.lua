-- Ask whether one record may be sent to see how things are. ARGV[4..6]: scope, token, how long its lease lasts (ms)
-- Reply: "free" (the circuit is closed), "probe" or "denied", and a view. The same token gets the same answer.
local scope, token, lease = ARGV[4], ARGV[5], tonumber(ARGV[6])
worker_looks()
local s = load(scope)
if s.forced ~= '' or s.state == 'closed' then return {shut(s) and 'denied' or 'free', view(s)} end
if redis.call('ZSCORE', key(scope, 'p'), token) then return {'probe', view(s)} end
if scope ~= CLUSTER and shut(load(CLUSTER)) then return {'denied', view(s)} end
if s.state == 'half-open' then lose_probes(s, lease) end
local due = s.state == 'half-open' or s.till <= now
if due and s.state == 'open' then change(s, 'half-open', 'its time is over') end
local granted = due and redis.call('ZCARD', key(scope, 'p')) == 0
if granted then
  redis.call('ZADD', key(scope, 'p'), now + lease, token)
  redis.call('PEXPIRE', key(scope, 'p'), KEEP)  -- of a topic that nobody sends to any more
  s.probe, s.probe_at, s.probe_ms = token, now, lease
end
if s.changed == 1 or s.moved or granted then save(s) end
return {granted and 'probe' or 'denied', view(s)}
